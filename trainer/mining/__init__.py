"""Mining over the whole corpus: rounds of examples and of classes that are near."""
