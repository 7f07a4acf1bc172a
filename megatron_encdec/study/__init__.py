"""From a tree of fine-tuning results to tables, figures and one page."""
