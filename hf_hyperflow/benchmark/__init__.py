"""Every method on the same few-shot episodes: accuracy, cost, tables and figures."""
