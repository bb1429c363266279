#!/usr/bin/env bash
# Base images for a machine that cannot pull any: Debian by debootstrap, and a PostgreSQL that knows the variables and the
# init folder of the official image as far as docker-compose.yml uses them. Needs root, docker and debootstrap.
#   compose_images.sh [PIP_CONF [CA_BUNDLE]]    both go into the base, for a machine with an index of its own
# Makes the images yolosearch-base:local and yolosearch-postgres:local.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/root" "$mirror" > /dev/null
rm -f "$work"/root/var/cache/apt/archives/*.deb
if [ -n "${1:-}" ]; then cp "$1" "$work/root/etc/pip.conf"; fi
if [ -n "${2:-}" ]; then cp "$2" "$work/root/etc/ssl/certs/ca-certificates.crt"; fi
tar -C "$work/root" -c . | docker import - yolosearch-base:local

mkdir "$work/postgres"
cat > "$work/postgres/Dockerfile" <<'DOCKERFILE'
FROM yolosearch-base:local
RUN apt-get update && apt-get install -y --no-install-recommends postgresql-15 && rm -rf /var/lib/apt/lists/*
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data
RUN mkdir -p /docker-entrypoint-initdb.d "$PGDATA" /run/postgresql \
    && chown postgres:postgres "$PGDATA" /run/postgresql && chmod 1777 "$PGDATA"
COPY entrypoint.sh /entrypoint.sh
STOPSIGNAL SIGINT
ENTRYPOINT ["bash", "/entrypoint.sh"]
CMD ["postgres"]
DOCKERFILE
cat > "$work/postgres/entrypoint.sh" <<'ENTRYPOINT'
set -euo pipefail
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb --username=postgres --pwfile=<(echo "$POSTGRES_PASSWORD") --auth-host=scram-sha-256 --auth-local=trust > /dev/null
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  pg_ctl -w start -o "-c listen_addresses=''"
  for script in /docker-entrypoint-initdb.d/*.sql; do
    psql -v ON_ERROR_STOP=1 --no-password --no-psqlrc --username=postgres --file "$script"
  done
  pg_ctl -m fast -w stop
fi
exec "$@" -c listen_addresses='*'
ENTRYPOINT
docker build --network host --tag yolosearch-postgres:local "$work/postgres"
