"""What a state store says to a PostgreSQL server."""

from __future__ import annotations

__all__ = ["ABOUT", "CHANGES", "EXPIRE", "GET", "KEYS", "LAST", "LISTEN", "MAKE", "NOW", "WRITE", "WRITES"]

# Found by the search path. A function that changes gets the next number: two releases may use one store.
MAKE = """
SELECT pg_advisory_xact_lock(108170603227969);  -- IF NOT EXISTS alone does not bear two at once

-- An index row holds 2,700 bytes and a key may be longer: it is found by its digest, ordered by its first bytes.
CREATE TABLE IF NOT EXISTS beluga_state
    (id bytea PRIMARY KEY, key bytea NOT NULL, value text NOT NULL, version bigint NOT NULL, ends timestamptz);
CREATE INDEX IF NOT EXISTS beluga_state_order ON beluga_state (substring(key, 1, 1000));
CREATE INDEX IF NOT EXISTS beluga_state_ends ON beluga_state (ends) WHERE ends IS NOT NULL;
CREATE TABLE IF NOT EXISTS beluga_state_change
    (version bigint PRIMARY KEY, key bytea NOT NULL, value text, at timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS beluga_state_version (last bigint NOT NULL) WITH (fillfactor = 10);
INSERT INTO beluga_state_version SELECT 0 WHERE NOT EXISTS (SELECT FROM beluga_state_version);

-- Makes a change, under its caller's lock; what is pruned is always the beginning.
CREATE OR REPLACE FUNCTION beluga_state_change_1(k bytea, v text, ttl float8, history bigint)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE n bigint;
BEGIN
    UPDATE beluga_state_version SET last = last + 1 RETURNING last INTO n;
    INSERT INTO beluga_state_change VALUES (n, k, v, clock_timestamp());
    IF v IS NULL THEN
        DELETE FROM beluga_state WHERE id = sha256(k);
    ELSE
        INSERT INTO beluga_state VALUES (sha256(k), k, v, n, clock_timestamp() + make_interval(secs => ttl))
        ON CONFLICT (id) DO UPDATE SET value = excluded.value, version = excluded.version, ends = excluded.ends;
    END IF;
    IF n % greatest(history / 100, 1) = 0 THEN
        DELETE FROM beluga_state_change WHERE version <= n - history AND version < greatest(n - 10 * history,
            (SELECT version FROM beluga_state_change WHERE at > now() - interval '7 days' ORDER BY version LIMIT 1));
    END IF;
    PERFORM pg_notify('beluga_state_' || 'beluga_state_change'::regclass::oid,
        n || ' ' || encode(substring(k, 1, 1000), 'escape'));
    RETURN n;
END $$;
CREATE OR REPLACE FUNCTION beluga_state_expire_1(history bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM beluga_state WHERE ends <= now()) THEN
        PERFORM FROM beluga_state_version FOR UPDATE;
        PERFORM beluga_state_change_1(key, NULL, NULL, history)
        FROM (SELECT key FROM beluga_state WHERE ends <= now() ORDER BY ends LIMIT 1000) AS gone;
    END IF;
END $$;
CREATE OR REPLACE FUNCTION beluga_state_write_1(k bytea, v text, ttl float8, expected bigint, history bigint)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE had bigint; is_over boolean; n bigint;
BEGIN
    -- Until the commit nobody else writes, and each statement below sees what the writer before has committed.
    PERFORM FROM beluga_state_version FOR UPDATE;
    SELECT version, ends <= clock_timestamp() INTO had, is_over FROM beluga_state WHERE id = sha256(k);
    IF is_over THEN
        PERFORM beluga_state_change_1(k, NULL, NULL, history);
        had := NULL;
    END IF;
    IF expected <> coalesce(had, 0) OR (v IS NULL AND had IS NULL) THEN RETURN NULL; END IF;
    n := beluga_state_change_1(k, v, ttl, history);
    IF n % 100 = 0 THEN PERFORM beluga_state_expire_1(history); END IF;  -- where nobody watches, nobody else does
    RETURN n;
END $$"""
ABOUT = "SELECT to_regproc('beluga_state_write_1') IS NOT NULL, pg_backend_pid()"
# named after the table: each store of a database has its own
LISTEN = "DO $$ BEGIN EXECUTE 'LISTEN beluga_state_' || 'beluga_state_change'::regclass::oid; END $$"
WRITE = "SELECT beluga_state_write_1(%s, %s, %s, %s, %s)"
WRITES = """SELECT beluga_state_write_1(k, v, ttl, expected, %s)
FROM unnest(%s::bytea[], %s::text[], %s::float8[], %s::bigint[]) AS writes (k, v, ttl, expected)"""
EXPIRE = "SELECT beluga_state_expire_1(%s)"
GET = "SELECT value, version FROM beluga_state WHERE id = sha256(%s) AND (ends > clock_timestamp()) IS NOT FALSE"
SPAN = """substring(key, 1, 1000) BETWEEN substring(%(start)s, 1, 1000) AND substring(%(end)s, 1, 1000)
AND key >= %(start)s AND key < %(end)s AND (ends > clock_timestamp()) IS NOT FALSE"""
KEYS = f"SELECT key FROM beluga_state WHERE {SPAN} ORDER BY substring(key, 1, 1000), key LIMIT %(limit)s"  # noqa: S608 - our own
NOW = f"SELECT last, key, value, version FROM beluga_state_version LEFT JOIN beluga_state ON {SPAN} ORDER BY version"  # noqa: S608
LAST = "SELECT last FROM beluga_state_version"
CHANGES = """SELECT version, key, value FROM (
    SELECT *, sum(coalesce(octet_length(value), 0)) OVER (ORDER BY version) - coalesce(octet_length(value), 0) AS before
    FROM beluga_state_change WHERE version > %(after)s ORDER BY version LIMIT %(limit)s
) AS page WHERE before < %(bytes)s ORDER BY version"""
