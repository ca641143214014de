"""Many runs from one sweep file: what to vary, in what order, and what came of it."""
