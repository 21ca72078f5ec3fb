"""What the auditor reads: audits, comparisons, edits and studies, one room each; `record` is what they all hand on."""
