"""What speaks for a method or against it: comparisons over seeds, its cost, what it looks at."""
