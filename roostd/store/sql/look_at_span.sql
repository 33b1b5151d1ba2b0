-- Writes down what there is in a span. Called by: every master, after it has archived and cleared what it could there.
-- Locks: the span's row (a HOT update). Index: job_rows' primary key: at most 10,000 rows.
UPDATE roost.spans
   SET looked_at = now(), oldest_end_at = seen.oldest_end_at, oldest_result_at = seen.oldest_result_at,
       may_change = coalesce(seen.may_change, false)
                    OR spans.number >= pg_sequence_last_value('roost.job_rows_id_seq') / 10000
  FROM (SELECT min(coalesce(j.completed_at, j.discarded_at, j.cancelled_at)) AS oldest_end_at,
               min(j.completed_at) FILTER (WHERE j.result IS NOT NULL) AS oldest_result_at,
               bool_or(j.state <> 'completed') AS may_change
          FROM roost.job_rows j
         WHERE j.id BETWEEN %(span)s::bigint * 10000 AND %(span)s::bigint * 10000 + 9999) AS seen
 WHERE spans.number BETWEEN %(span)s::bigint AND %(span)s::bigint
