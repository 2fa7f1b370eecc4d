"""What methods look at: their maps and weights, drawn over images."""
