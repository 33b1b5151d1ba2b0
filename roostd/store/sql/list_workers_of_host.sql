-- The rows that masters on this host left or hold, and how long each has been silent. Called by: the master at start.
-- Scans workers, a few rows.
SELECT w.id, extract(epoch FROM now() - w.last_seen_at)::float8 AS silent_seconds, w.metadata
  FROM roost.workers w
 WHERE w.hostname = %(hostname)s
