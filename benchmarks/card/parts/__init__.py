"""One file a part of the campaign, each with `run(job, rows)`."""
