-- The rows that masters on this host left or hold. Called by: the master at start. Scans workers, a few rows.
SELECT w.id, w.pid, w.metadata FROM roost.workers w WHERE w.hostname = %(hostname)s
