-- Forgets up to 1,000 slots that fired more than a day ago, but never the latest of an entry, and entries that no worker has
-- known for 30 days. Returns how many slots.
-- Called by: every master, every five minutes, until fewer are left. Locks: the rows it removes (SKIP LOCKED).
-- Index: cron_runs_by_slot; scans cron_entries, a row an entry.
WITH old AS MATERIALIZED (
    SELECT r.name, r.slot
      FROM roost.cron_runs r
     WHERE r.slot < now() - interval '1 day'
       AND (EXISTS (SELECT 1 FROM roost.cron_runs l WHERE l.name = r.name AND l.slot > r.slot AND l.slot <= now())
            OR NOT EXISTS (SELECT 1 FROM roost.cron_entries e WHERE e.name = r.name))
     ORDER BY r.slot
     LIMIT 1000
       FOR UPDATE SKIP LOCKED
), unknown AS MATERIALIZED (
    SELECT e.name
      FROM roost.cron_entries e
     WHERE e.seen_at < now() - interval '30 days'
       FOR UPDATE SKIP LOCKED
), forgotten AS (
    DELETE FROM roost.cron_entries USING unknown WHERE cron_entries.name = unknown.name
), removed AS (
    DELETE FROM roost.cron_runs USING old WHERE cron_runs.name = old.name AND cron_runs.slot = old.slot
    RETURNING 1
)
SELECT count(*) FROM removed
