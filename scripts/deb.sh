#!/bin/sh
# Makes the Debian package: scripts/deb.sh [release|dev]. Manual pages and completions come from the binary's own definitions.
# Needs cargo-deb (cargo install cargo-deb). The package is in target/debian/ (or $CARGO_TARGET_DIR/debian/).
set -eu
cd "$(dirname "$0")/.."
profile=${1:-release}
target=${CARGO_TARGET_DIR:-target}
case $profile in release) directory=release ;; dev) directory=debug ;; *) echo "usage: scripts/deb.sh [release|dev]" >&2; exit 2 ;; esac
cargo build --profile "$profile" -p relay
relay=$target/$directory/relay
# The assets name this place whatever the target directory is.
generated=target/packaging
mkdir -p "$generated/man"
"$relay" man "$generated/man"
for page in "$generated"/man/*.1; do gzip -9nf "$page"; done
"$relay" completions bash > "$generated/relay.bash"
"$relay" completions zsh > "$generated/_relay"
"$relay" completions fish > "$generated/relay.fish"
cargo deb --no-build --strip --profile "$profile" -p relay
