"use strict";
// Adds interaction only: all content is visible without scripts.

/** Calls `move` with the pointer's position in an element, from 0 to 1, and `leave`. */
function follow(element, move, leave) {
  const place = (event) => {
    const box = element.getBoundingClientRect();
    move((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };
  element.addEventListener("pointerdown", place);
  element.addEventListener("pointermove", place);
  element.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") leave();
  });
}

/** Returns the index of the smallest value; -1 for an empty array. */
function smallest(values) {
  let best = -1;
  values.forEach((value, i) => {
    if (value < Infinity && (best < 0 || value < values[best])) best = i;
  });
  return best;
}

function pointAtPlot(plot) {
  const data = JSON.parse(plot.dataset.plot);
  const output = plot.closest("figure").querySelector("output");
  const atRest = output.textContent;
  const cursor = plot.querySelector(".cursor");
  const marks = [...plot.querySelectorAll(".mark")];
  let current = -1;

  function show(i) {
    if (i === current || i < 0) return;
    current = i;
    plot.classList.add("pointed");
    cursor.style.left = `${data.x[i]}%`;
    const words = [data.heads[i]];
    data.series.forEach((series, s) => {
      const isThere = series.y[i] !== null;
      marks[s].classList.toggle("there", isThere);
      if (!isThere) return;
      marks[s].style.left = `${data.x[i]}%`;
      marks[s].style.top = `${series.y[i]}%`;
      words.push(series.name ? `${series.name} ${series.texts[i]}` : series.texts[i]);
    });
    output.textContent = words.join(" · ");
  }
  function rest() {
    current = -1;
    plot.classList.remove("pointed");
    output.textContent = atRest;
  }
  follow(plot, (x) => show(smallest(data.x.map((at) => Math.abs(at - 100 * x)))), rest);
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    const last = data.x.length - 1;
    const next = {
      ArrowLeft: Math.max(0, (current < 0 ? last + 1 : current) - 1),
      ArrowRight: Math.min(last, current + 1),
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === "Escape") rest();
    if (next === undefined) return;
    event.preventDefault();
    show(next);
  });
}

function pointAtMap(map) {
  const canvas = map.querySelector(".canvas");
  const card = map.querySelector(".card");
  const atRest = card.innerHTML;
  const circles = [...canvas.querySelectorAll("circle")];
  const { width, height } = canvas.querySelector("svg").viewBox.baseVal;
  const points = circles.map((circle) => ({
    x: circle.cx.baseVal.value / width,
    y: circle.cy.baseVal.value / height,
    className: circle.dataset.name,
  }));
  const sprite = map.dataset.sprite ? JSON.parse(map.dataset.sprite) : null;
  let chosen = -1;

  function choose(i) {
    if (i < 0) return;
    canvas.classList.add("pointed");
    if (i === chosen) return;
    if (chosen >= 0) circles[chosen].classList.remove("chosen");
    if (chosen < 0 || points[chosen].className !== points[i].className) {
      circles.forEach((circle, j) => {
        circle.classList.toggle("alike", points[j].className === points[i].className);
      });
    }
    chosen = i;
    circles[i].classList.add("chosen");
    fill(i);
  }
  function rest() {
    if (chosen < 0) return;
    circles[chosen].classList.remove("chosen");
    circles.forEach((circle) => circle.classList.remove("alike"));
    canvas.classList.remove("pointed");
    chosen = -1;
    card.innerHTML = atRest;
    card.classList.add("empty");
  }
  function fill(i) {
    const item = circles[i].id.replace("item-", "");
    const words = document.createElement("div");
    const line = (tag, text, kind) => {
      const element = document.createElement(tag);
      element.textContent = text;
      if (kind) element.className = kind;
      words.append(element);
    };
    line("b", points[i].className);
    line("small", `item ${item}`);
    if (circles[i].classList.contains("mistake")) {
      line("small", "Nearest neighbour is of another class", "wrong-word");
    }
    if (document.getElementById(`query-${item}`)) {
      const link = document.createElement("a");
      link.href = `#query-${item}`;
      link.textContent = "its neighbours";
      const small = document.createElement("small");
      small.append(link);
      words.append(small);
    }
    card.classList.toggle("empty", !sprite);
    card.replaceChildren(...(sprite ? [picture(i)] : []), words);
  }
  function picture(i) {
    const element = document.createElement("div");
    element.className = `sprite${sprite.width < 48 ? " small" : ""}`;
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", points[i].className);
    const column = i % sprite.columns;
    const row = Math.floor(i / sprite.columns);
    const share = (at, of) => (of > 1 ? (100 * at) / (of - 1) : 0);
    element.style.aspectRatio = `${sprite.width} / ${sprite.height}`;
    element.style.backgroundImage = `url(${map.querySelector("img.sheet").src})`;
    element.style.backgroundSize = `${100 * sprite.columns}% ${100 * sprite.rows}%`;
    element.style.backgroundPosition =
      `${share(column, sprite.columns)}% ${share(row, sprite.rows)}%`;
    return element;
  }
  /** Returns the nearest point in a direction, with a penalty for sideways distance. */
  function towards(dx, dy) {
    const from = chosen < 0 ? { x: 0.5, y: 0.5 } : points[chosen];
    return smallest(points.map((to, i) => {
      const along = (to.x - from.x) * dx + (to.y - from.y) * dy;
      const aside = Math.abs((to.x - from.x) * dy) + Math.abs((to.y - from.y) * dx);
      return i === chosen || along <= 0 ? Infinity : along + 2 * aside;
    }));
  }
  follow(canvas, (x, y) => {
    choose(smallest(points.map((at) => (at.x - x) ** 2 + (at.y - y) ** 2)));
  }, () => canvas.classList.remove("pointed")); // The card stays clickable.
  canvas.addEventListener("keydown", (event) => {
    const steps = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
    };
    if (event.key === "Escape") rest();
    if (!(event.key in steps)) return;
    event.preventDefault();
    choose(towards(...steps[event.key]));
  });
  const goTo = () => {
    const i = circles.findIndex((circle) => `#${circle.id}` === location.hash);
    choose(i);
  };
  window.addEventListener("hashchange", goTo);
  goTo();
}

/** Arrow keys move between neighbours; the tab key moves to the next query. */
function walk(list) {
  list.addEventListener("keydown", (event) => {
    const items = [...list.children];
    const at = items.indexOf(document.activeElement);
    const next = items[at + { ArrowLeft: -1, ArrowRight: 1 }[event.key]];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
}

document.querySelectorAll(".plot").forEach(pointAtPlot);
document.querySelectorAll(".map").forEach(pointAtMap);
document.querySelectorAll(".answers").forEach(walk);
