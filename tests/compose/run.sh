#!/usr/bin/env bash
# Builds the images and tests the cluster they form: three denoisers, one of them killed, another stopped while it draws.
# Needs a Docker engine, Compose and .venv (make compose-test). Keeps the images, so that a second run builds little.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export COMPOSE_FILE=docker-compose.yml COMPOSE_PROJECT_NAME=darkroom-test-$$
# Port 0: Docker takes free ones.
export DARKROOM_BIND=127.0.0.1 DARKROOM_PORT=0 DARKROOM_CACHEMGR_PORT=0
DARKROOM_MODELS=$(mktemp -d)
export DARKROOM_MODELS
build_limit_s=1800 start_limit_s=180 draw_limit_s=120 stop_limit_s=20

if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi

finish() {
    local code=$?
    trap - EXIT
    if ((code)); then
        echo "FAILED; the end of each container's log:" >&2
        timeout 60 "${compose[@]}" ps >&2 || true
        timeout 60 "${compose[@]}" logs --no-color --tail 40 >&2 || true
    fi
    if ! timeout 120 "${compose[@]}" down --volumes --remove-orphans --timeout 20 >/dev/null 2>&1; then
        echo "FAILED to take $COMPOSE_PROJECT_NAME down" >&2
        code=1
    fi
    rm -rf "$DARKROOM_MODELS"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "$*" >&2
    exit 1
}

ok() { printf 'OK %4d s  %s\n' "$SECONDS" "$*"; }

containers() { "${compose[@]}" ps -q "$@"; }

layers() { docker image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" | sed '/^$/d' | sort; }

has_torch() { docker run --rm --network none "$1" python -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))'; }

# Returns once every container is healthy.
wait_until_healthy() {
    local format='{{.State.Status}}/{{.State.Health.Status}}' end=$((SECONDS + start_limit_s)) states
    while :; do
        states=$(containers | xargs docker inspect --format "$format" | sort -u)
        [[ $states == running/healthy ]] && return
        ((SECONDS < end)) || fail "not healthy after $start_limit_s s: $states"
        sleep 1
    done
}

# Draws $1 pictures at once, after the command in the other arguments. Sets $denoisers, how many took part, and
# $repeated, how many calls to one had to be made again on another.
draw() {
    local answer
    answer=$(timeout "$draw_limit_s" .venv/bin/python tests/compose/draw.py "$router" "$@") || fail "drawing failed"
    denoisers=$(sed -n 's/^denoisers //p' <<<"$answer" | wc -w)
    repeated=$(sed -n 's/^repeated //p' <<<"$answer")
}

docker info >/dev/null 2>&1 || fail "no Docker engine answers at ${DOCKER_HOST:-its default socket}"
# A copy that any user can read: safetensors writes files that only their owner can.
cp -R models/shapes "$DARKROOM_MODELS"
chmod -R a+rX "$DARKROOM_MODELS"

# The log is worth reading only when the build fails.
log=$(timeout "$build_limit_s" "${compose[@]}" build 2>&1) || fail "$log"
ok "the images are built"

# All but the service's own code and its bytecode.
common=$(comm -12 <(layers darkroom-encoder) <(layers darkroom-denoiser) | comm -12 - <(layers darkroom-vae) | wc -l)
(($(layers darkroom-vae | wc -l) - common == 2)) || fail "the stages' images share only $common layers"
has_torch darkroom-vae || fail "darkroom-vae has no torch"
for image in darkroom-router darkroom-cachemgr; do
    ! has_torch "$image" || fail "$image has torch"
done
ok "the stages' images share $common layers; router and cache manager are without torch"

log=$("${compose[@]}" up -d --scale denoiser=3 2>&1) || fail "$log"
wait_until_healthy
router=$("${compose[@]}" port router 7600)
ok "every container is healthy; the router is at $router"
for container in $(containers); do
    [[ $(docker exec "$container" id -u) != 0 ]] || fail "$container runs as root"
done
ok "no container runs as root"

draw 12
((denoisers == 3)) || fail "$denoisers denoisers took part, not 3"
ok "12 pictures drawn at once by $denoisers denoisers"

mapfile -t replicas < <(containers denoiser)
draw 12 docker kill "${replicas[0]}"
((denoisers == 2)) || fail "$denoisers denoisers took part, not 2"
((repeated)) || fail "nobody called the denoiser that was killed"
ok "a denoiser killed: 12 pictures drawn by the other $denoisers, $repeated of them after a call to the dead one"

draw 12 &
drawing=$!
sleep 1.5
start_s=$SECONDS
docker stop --time 40 "${replicas[1]}" >/dev/null
stop_s=$((SECONDS - start_s))
wait "$drawing" || fail "a picture was lost when a denoiser was stopped"
log=$(docker logs "${replicas[1]}" 2>&1)
[[ $log == *'"draining"'*'"stopped"'* ]] || fail "the stopped denoiser did not drain: $log"
((stop_s < stop_limit_s)) || fail "a denoiser took $stop_s s to stop"
ok "a denoiser stopped in $stop_s s while 12 pictures were drawn: none lost"

for _ in 1 2 3; do draw 1; done
ok "three more pictures by the denoiser that is left"
