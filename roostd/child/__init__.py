"""The process that runs handlers: one job at a time, no database, no thread of ours."""
