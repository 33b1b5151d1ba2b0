-- What fires by the clock: the entries that workers know, and which of their slots have fired.
--
-- The rows of cron_entries are the workers' own word, so that whoever reads them needs no handlers: a worker writes what
-- it has when it starts and at every reload (the last one wins), and every five minutes that it still knows it.
-- A slot is an instant at which an entry fires. It fires once: its row in cron_runs is inserted in the transaction of its
-- job, whoever tries, and however often.

CREATE TABLE roost.cron_entries (
    name            text        COLLATE "C" PRIMARY KEY,
    since           timestamptz NOT NULL,  -- slots up to here never fire: it was not known, not enabled, or paused
    seen_at         timestamptz NOT NULL,  -- when a worker last said that it knows it
    paused_at       timestamptz,
    priority        integer     NOT NULL,
    max_attempts    integer     NOT NULL,
    timeout_seconds integer,
    enabled         boolean     NOT NULL,
    expression      text        NOT NULL,
    timezone        text        NOT NULL,
    task            text        NOT NULL,
    queue           text        NOT NULL,
    catch_up        text        NOT NULL,
    source          text        NOT NULL,
    args            jsonb       NOT NULL,
    tags            text[],
    CONSTRAINT name_has_1_to_128_characters CHECK (char_length(name) BETWEEN 1 AND 128),
    CONSTRAINT catch_up_is_known CHECK (catch_up IN ('none', 'latest'))
) WITH (fillfactor = 70);

CREATE TABLE roost.cron_runs (
    name     text        COLLATE "C" NOT NULL,
    slot     timestamptz NOT NULL,
    fired_at timestamptz NOT NULL,
    job_id   bigint,  -- null only within the transaction that fires it
    PRIMARY KEY (name, slot)
) WITH (fillfactor = 90);

CREATE INDEX cron_runs_by_slot ON roost.cron_runs (slot);  -- for the removal of old rows

-- Fires a slot in the caller's transaction: its row and its job, or neither. Returns the job's id, NULL where the slot has
-- fired already. Waits for whoever is firing it just now.
CREATE FUNCTION roost.fire_cron(
    name            text,
    slot            timestamptz,
    task            text,
    args            jsonb,
    queue           text,
    priority        integer,
    max_attempts    integer,
    tags            text[],
    timeout_seconds integer
) RETURNS bigint
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    fired_job bigint;
BEGIN
    INSERT INTO roost.cron_runs (name, slot, fired_at) VALUES (name, slot, now()) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    fired_job := roost.enqueue(
        task => task, args => args, queue => queue, priority => priority, max_attempts => max_attempts, tags => tags,
        timeout_seconds => timeout_seconds,
        metadata => jsonb_build_object('cron', jsonb_build_object('name', name, 'slot', slot)));
    UPDATE roost.cron_runs r SET job_id = fired_job WHERE r.name = name AND r.slot = slot;
    RETURN fired_job;
END $$;

-- Enqueues the job of an entry now, outside its slots, paused or not. Returns its id, NULL when there is no such entry.
CREATE FUNCTION roost.run_cron(name text) RETURNS bigint
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
    RETURN (SELECT roost.enqueue(
                       task => e.task, args => e.args, queue => e.queue, priority => e.priority,
                       max_attempts => e.max_attempts, tags => e.tags, timeout_seconds => e.timeout_seconds,
                       metadata => jsonb_build_object('cron', jsonb_build_object('name', name, 'slot', NULL)))
              FROM roost.cron_entries e
             WHERE e.name = name);
END $$;

-- Keeps an entry from firing, or lets it fire again: from then on, slots that passed meanwhile are not made up for.
-- Returns whether there is such an entry.
CREATE FUNCTION roost.pause_cron(name text, paused boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
    UPDATE roost.cron_entries e
       SET paused_at = CASE WHEN paused THEN coalesce(e.paused_at, now()) END,
           since = CASE WHEN NOT paused AND e.paused_at IS NOT NULL THEN now() ELSE e.since END
     WHERE e.name = name;
    RETURN FOUND;
END $$;
