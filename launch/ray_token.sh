# shellcheck shell=bash
# Ray's token, for the scripts that source this. Ray itself looks for it in this order: RAY_AUTH_TOKEN, the file that
# RAY_AUTH_TOKEN_PATH names, ~/.ray/auth_token. All nodes of a cluster and all who use it need the same one.

ray_token_file() {
    printf '%s\n' "${RAY_AUTH_TOKEN_PATH:-${HOME:-/nonexistent}/.ray/auth_token}"
}

# use_ray_token: token authentication, where there is a token and RAY_AUTH_MODE does not say otherwise.
use_ray_token() {
    if [[ -z "${RAY_AUTH_MODE:-}" ]] && { [[ -n "${RAY_AUTH_TOKEN:-}" ]] || [[ -s "$(ray_token_file)" ]]; }; then
        export RAY_AUTH_MODE=token
    fi
}

# require_ray_token: token authentication; a token that nobody has yet is written to the file, for its owner alone.
require_ray_token() {
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
    [[ "$RAY_AUTH_MODE" == token && -z "${RAY_AUTH_TOKEN:-}" ]] || return 0
    local file
    file="$(ray_token_file)"
    if [[ ! -s "$file" ]]; then
        (
            umask 077
            mkdir -p "$(dirname "$file")"
            od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$file"
        )
        echo "ray token: wrote a new one to $file; the other nodes need the same file, see docs/clusters.md" >&2
    fi
    if [[ -n "$(find -L "$file" -perm /077)" ]]; then
        echo "ray token: $file can be read by others; run: chmod 600 $file" >&2
        return 2
    fi
    export RAY_AUTH_TOKEN_PATH="$file"
}
