"""What tasks cost: `hyperflow bench`, the cost columns of `hyperflow benchmark`, and the costs in model cards."""
