//! Looks for OpenBLAS before the linker does, so that a missing library is one sentence instead of a page of linker errors.

use std::process::Command;

const HELP: &str = "OpenBLAS was not found. Install it and build again:\n\
    Debian, Ubuntu:  sudo apt-get install libopenblas-dev\n\
    Fedora:          sudo dnf install openblas-devel\n\
    Arch:            sudo pacman -S openblas\n\
    macOS:           brew install openblas\n\
or build OpenBLAS from source (needs network):  cargo build --no-default-features --features openblas-static,cli\n\
or do without BLAS (slower):                    cargo build --no-default-features --features cli";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    let wants_system = std::env::var_os("CARGO_FEATURE_OPENBLAS_SYSTEM").is_some();
    let builds_source = std::env::var_os("CARGO_FEATURE_OPENBLAS_STATIC").is_some();
    let docs_only = std::env::var_os("DOCS_RS").is_some();
    let unix = std::env::var("CARGO_CFG_TARGET_FAMILY").is_ok_and(|f| f.contains("unix"));
    if !wants_system || builds_source || docs_only || !unix {
        return;
    }
    let by_pkg_config = pkg_config::Config::new().cargo_metadata(false).probe("openblas").is_ok();
    if !by_pkg_config && !linker_finds_it() && !homebrew_has_it() {
        eprintln!("{HELP}");
        std::process::exit(1);
    }
}

/// Whether the C compiler's linker resolves `-lopenblas` (a library without a pkg-config file).
fn linker_finds_it() -> bool {
    let out = std::path::Path::new(&std::env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("probe");
    let source = out.with_extension("c");
    std::fs::write(&source, "int main(void) { return 0; }").is_ok()
        && Command::new("cc")
            .arg(&source)
            .args(["-lopenblas", "-o"])
            .arg(&out)
            .output()
            .is_ok_and(|run| run.status.success())
}

/// Homebrew keeps OpenBLAS out of the linker's path; openblas-src asks `brew` for it.
fn homebrew_has_it() -> bool {
    Command::new("brew").args(["--prefix", "--installed", "openblas"]).output().is_ok_and(|run| run.status.success())
}
