-- Makes the limits of these tasks what the handlers declare that a worker has loaded; null, null: the task has none.
-- A task that was not limited before starts nothing for a second: see roost.throttle_room.
-- Called by: the master, before its first claim with new handlers. Safe to repeat.
-- Locks: the rows of throttles that it changes, in their order. Index: primary key.
INSERT INTO roost.throttles AS t (task, rate_per_minute, max_concurrency)
SELECT d.task, d.rate_per_minute, d.max_concurrency
  FROM unnest(%(tasks)s::text[], %(rates)s::integer[], %(concurrencies)s::integer[]) AS d(task, rate_per_minute, max_concurrency)
 WHERE d.rate_per_minute IS NOT NULL OR d.max_concurrency IS NOT NULL
    OR EXISTS (SELECT 1 FROM roost.throttles old WHERE old.task = d.task COLLATE "C")
 ORDER BY d.task COLLATE "C"
ON CONFLICT (task) DO UPDATE
   SET rate_per_minute = excluded.rate_per_minute, max_concurrency = excluded.max_concurrency,
       limited_since = CASE WHEN t.limited THEN t.limited_since ELSE clock_timestamp() END,
       counted = t.limited AND t.counted
 WHERE (t.rate_per_minute, t.max_concurrency) IS DISTINCT FROM (excluded.rate_per_minute, excluded.max_concurrency)
