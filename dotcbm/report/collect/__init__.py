"""One pass over a split, and the few that show the model changed pictures; everything an audit computes starts from these columns."""
