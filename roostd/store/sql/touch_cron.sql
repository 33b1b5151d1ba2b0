-- Says that a worker still knows these entries, if that has not been said for a minute; returns those that have no row.
-- Called by: every master, every five minutes. Locks: the entries' rows (SKIP LOCKED: whoever holds one says the same).
-- Index: primary key.
WITH held AS MATERIALIZED (
    SELECT e.name
      FROM roost.cron_entries e
     WHERE e.name = ANY (%(names)s::text[]) AND e.seen_at < now() - interval '1 minute'
       FOR UPDATE SKIP LOCKED
), touched AS (
    UPDATE roost.cron_entries AS e SET seen_at = now() FROM held WHERE e.name = held.name
)
SELECT n.name
  FROM unnest(%(names)s::text[]) AS n(name)
 WHERE NOT EXISTS (SELECT 1 FROM roost.cron_entries e WHERE e.name = n.name)
