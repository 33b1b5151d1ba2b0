-- Tells up to 1,000 dependents that a parent has ended: they are made due, or cancelled. `only`: of these parents, NULL for all.
-- Returns how many were told, the parents of which others were passed over because another transaction holds them, and which of
-- the cancelled have dependents themselves (NULL: none).
-- Called by: the master, for the parents that complete and settle name, and at every poll for what is left of others.
-- Locks, all SKIP LOCKED: ended_parents, blocked, the job rows of those cancelled. Index: primary keys.
SELECT f.told, f.held, f.more FROM roost.follow_parents(%(only)s::bigint[]) AS f
