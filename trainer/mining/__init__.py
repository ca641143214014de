"""Mining over the whole corpus: rounds of hard examples and of neighbouring classes."""
