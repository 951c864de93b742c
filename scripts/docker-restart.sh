#!/usr/bin/env bash
# Rebuild the image, restart every service, and wait until all of them are healthy; data stays.
# Usage: scripts/docker-restart.sh
set -euo pipefail
cd "$(dirname "$0")/.."

SERVICES=(postgres redis api worker flower)
WAIT_SECONDS=120

main() {
    find_compose
    echo "Building the image ..."
    compose build || fail "The image could not be built; what runs was left alone."
    echo "Restarting ..."
    compose down --remove-orphans || fail "The services could not be stopped."
    if ! compose up --detach; then
        compose logs --tail 20 migrate >&2
        fail "The services could not be started; above are the last lines of the migrations."
    fi
    wait_until_healthy
    compose ps
    echo "All services are healthy: http://localhost:8000/docs, Flower at http://localhost:5555"
}

find_compose() {
    command -v docker >/dev/null || fail "Docker is not installed, or not on the PATH."
    docker info >/dev/null 2>&1 || fail "The Docker engine does not answer: is it started, and may you use it?"
    if docker compose version >/dev/null 2>&1; then
        COMPOSE=(docker compose)
    elif command -v docker-compose >/dev/null; then
        COMPOSE=(docker-compose)
    else
        fail "Docker Compose is not installed."
    fi
}

compose() {
    "${COMPOSE[@]}" "$@"
}

wait_until_healthy() {
    local deadline=$((SECONDS + WAIT_SECONDS)) service
    for service in "${SERVICES[@]}"; do
        until is_healthy "$service"; do
            if [ "$SECONDS" -ge "$deadline" ]; then
                compose ps >&2
                compose logs --tail 20 "$service" >&2
                fail "$service is not healthy after $WAIT_SECONDS s; above are its last lines."
            fi
            sleep 1
        done
        echo "$service is healthy."
    done
}

# Every container of the service, should there be several.
is_healthy() {
    local ids states
    ids=$(compose ps --quiet "$1") && [ -n "$ids" ] || return 1
    # shellcheck disable=SC2086 # one word per container
    states=$(docker inspect --format '{{.State.Health.Status}}' $ids) || return 1
    [ "$(sort -u <<<"$states")" = healthy ]
}

fail() {
    echo "$1" >&2
    exit 1
}

main
