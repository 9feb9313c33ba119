# shellcheck shell=bash
# What the scripts share: installs what is missing, and says so before it does; selects tests.
# To be sourced. Works with the bash 3.2 of macOS.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

say() { printf '==> %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# How this system installs packages, for a person to type.
by_hand() {
    if have apt-get; then echo "apt-get install build-essential pkg-config libopenblas-dev curl ca-certificates python3"
    elif have dnf; then echo "dnf install gcc make pkgconf-pkg-config openblas-devel curl python3"
    elif have pacman; then echo "pacman -S base-devel openblas curl python"
    elif have brew; then echo "brew install openblas pkg-config"
    else echo "a C compiler, pkg-config, OpenBLAS with its headers, curl, Python 3"
    fi
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"
    elif have sudo; then sudo "$@"
    else die "installing packages needs root, and sudo is missing; as root: $(by_hand)"
    fi
}

# need_packages PACKAGE...: installs Debian packages.
need_packages() {
    [ $# -gt 0 ] || return 0
    have apt-get || die "missing: $*; install with: $(by_hand)"
    local install="env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
    say "installing the packages $* (apt-get$([ "$(id -u)" -eq 0 ] || echo ", with sudo"))"
    # The lists of a fresh machine are empty, those of an old one name files that are gone.
    # shellcheck disable=SC2086
    if ! apt-cache show "$@" >/dev/null 2>&1 || ! as_root $install "$@" >&2; then
        say "updating the package lists"
        as_root apt-get update -qq >&2 || die "the package lists cannot be updated; see above"
        as_root $install "$@" >&2 || die "installing $* failed; see above"
    fi
}

have_openblas() {
    pkg-config --exists openblas 2>/dev/null && return
    echo 'int main(void) { return 0; }' | cc -x c - -lopenblas -o /dev/null 2>/dev/null && return
    have brew && brew --prefix --installed openblas >/dev/null 2>&1
}

# What the linker needs.
need_native() {
    local missing=""
    have cc || missing="$missing build-essential"
    have pkg-config || missing="$missing pkg-config"
    have_openblas || missing="$missing libopenblas-dev"
    # shellcheck disable=SC2086
    need_packages $missing
}

# Checks how C programs use memory; where there is no package of it the tests go without, and say so.
need_valgrind() { have valgrind || ! have apt-get || need_packages valgrind; }

need_python() { have python3 || need_packages python3; }

# need_venv FOLDER PACKAGE...: a virtual environment of Python's with these packages from PyPI.
need_venv() {
    local venv=$1
    shift
    if [ ! -x "$venv/bin/python" ]; then
        # Debian's Python can make none by itself.
        python3 -c 'import ensurepip' 2>/dev/null || need_packages python3-venv
        say "making a virtual environment in ${venv#"$root/"}"
        python3 -m venv "$venv"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        die "pip cannot install $*; see above"
}

# cargo, of the version that Cargo.toml asks for.
need_rust() {
    # A rustup of this user that no shell has been told of yet.
    have cargo || PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    if ! have cargo; then
        local missing=""
        have curl || missing="curl"
        [ -e /etc/ssl/certs/ca-certificates.crt ] || ! have apt-get || missing="$missing ca-certificates"
        # shellcheck disable=SC2086
        need_packages $missing
        say "installing Rust for this user with rustup (https://rustup.rs), into ${CARGO_HOME:-$HOME/.cargo}"
        curl --proto '=https' --tlsv1.2 -sSf --retry 3 https://sh.rustup.rs | sh -s -- -y -q --profile minimal >&2 ||
            die "rustup failed; see above, or install Rust as https://rustup.rs says"
    fi
    local wanted version
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    version=$(rustc --version 2>&1 | sed -n 's/^rustc \([0-9.]*\).*/\1/p')
    [ -n "$version" ] || die "rustc does not run: $(rustc --version 2>&1 | head -n 1); try: rustup default stable"
    [ "$(printf '%s\n' "$wanted" "$version" | sort -t. -k1,1n -k2,2n | head -n 1)" = "$wanted" ] ||
        die "Rust $version is too old, $wanted or newer is needed; run: rustup update stable" \
            "(a Rust from the system's packages: remove it and install by https://rustup.rs)"
}

# need_cargo_tool SUBCOMMAND COMPONENT: a cargo subcommand that is a component of rustup's.
need_cargo_tool() {
    cargo "$1" --version >/dev/null 2>&1 && return
    have rustup || die "cargo $1 is missing; install $2 the way you installed Rust"
    say "adding $2 to Rust (rustup)"
    rustup component add "$2" >&2
}

# test_filters LIST ROOM...: what selects the unit tests of these rooms, of which LIST, as `cargo test -- --list` prints it, has
# to have some each.
test_filters() {
    local listed=$1 room
    shift
    for room in "$@"; do
        grep -q "^$room::.*: test$" <<<"$listed" || die "there are no unit tests of $room; it may be called otherwise now"
        printf '%s:: ' "$room"
    done
}
