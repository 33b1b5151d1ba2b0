-- Adds the spans that ids have reached, and returns those where there may be something to do, not looked at for the longest
-- first: of each its number, and the time. `since`: only what was last looked at before (NULL: now). Ages are seconds, NULL:
-- not wanted. What may change is looked at again when something that ended right after the last look would be old enough, and
-- each span once a day, because a transaction may have kept its ids to itself for long.
-- Called by: every master, at every archive_interval. Locks: none but the new rows. Scans spans, one row for 10,000 jobs.
WITH next AS (
    SELECT coalesce((SELECT max(s.number) + 1 FROM roost.spans s),
                    (SELECT min(j.id) / 10000 FROM roost.job_rows j)) AS number
), added AS (
    INSERT INTO roost.spans AS s (number)
    SELECT n.number
      FROM next,
           generate_series(next.number,
                           least(next.number + 999, pg_sequence_last_value('roost.job_rows_id_seq') / 10000)) AS n(number)
    ON CONFLICT (number) DO NOTHING
    RETURNING s.number, s.looked_at
)
SELECT due.number, now() AS at
  FROM (SELECT added.number, added.looked_at FROM added
        UNION ALL
        SELECT s.number, s.looked_at
          FROM roost.spans s
         WHERE s.looked_at IS NULL
            OR s.looked_at < coalesce(%(since)s::timestamptz, now())
               AND (s.oldest_end_at < now() - make_interval(secs => %(archive_after)s::float8)
                    OR s.oldest_result_at < now() - make_interval(secs => %(result_ttl)s::float8)
                    OR s.may_change
                       AND s.looked_at < now() - make_interval(secs => least(%(archive_after)s::float8, %(result_ttl)s::float8))
                    OR s.looked_at < now() - interval '1 day')) AS due
 ORDER BY due.looked_at NULLS FIRST, due.number
 LIMIT 100
