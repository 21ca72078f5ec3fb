"""Numbers: a plain function and a torchmetrics class for each."""
