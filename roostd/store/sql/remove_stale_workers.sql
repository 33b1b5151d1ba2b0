-- Declares workers dead whose heartbeat is too old: without its row a worker claims nothing, and notices at its next beat.
-- Called by: every master's reaper. Locks: the stale rows (SKIP LOCKED: a beat under way wins). Scans workers, a few rows.
DELETE FROM roost.workers
 WHERE id IN (SELECT w.id FROM roost.workers w
               WHERE w.last_seen_at < now() - make_interval(secs => %(stale_after)s::float8)
                 FOR UPDATE SKIP LOCKED)
RETURNING id, name, hostname, pid
