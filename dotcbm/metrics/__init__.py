"""Numbers about concepts, classes and places: plain functions here, torchmetrics classes in `dotcbm.metrics.accumulators`."""
