"""From the files of a run folder to report.json, report.md and the model card."""
