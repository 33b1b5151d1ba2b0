-- Writes the verdict on a reload where who asked for it looks: workers.metadata -> 'reload'.
-- Called by: the master after a reload. Locks: its own row.
UPDATE roost.workers AS w
   SET metadata = w.metadata || jsonb_build_object('reload', %(verdict)s::jsonb)
 WHERE w.id = %(id)s::uuid
