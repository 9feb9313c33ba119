//! The tests in Python (`python/tests/*.py`), and the check of the type stubs, on the library as this profile compiles it: put
//! together with the package's Python code as maturin does it.
//!
//! They run in the Python that the variable `GEMMNET_PYTHON` names, with what `scripts/test` installs there: mypy, numpy,
//! onnxruntime, pytest and tqdm. Tests that need PyTorch are skipped where it has none.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library that was compiled with this test, as an example: by `cargo test` if it is told no targets.
fn library() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let profile = program.ancestors().nth(2).expect("the program is in PROFILE/deps");
    let name = format!("{}native{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let path = profile.join("examples").join(name);
    assert!(path.exists(), "there is no {path:?}; run `cargo test -p gemmnet-python`");
    path
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("py" | "pyi" | "typed") => drop(fs::copy(&path, &to).unwrap()),
            None if path.is_dir() && !path.ends_with("__pycache__") => copy(&path, &to),
            _ => {}
        }
    }
}

#[test]
fn the_package_does_what_its_tests_say() {
    let Some(python) = std::env::var_os("GEMMNET_PYTHON") else {
        let fix = "run scripts/test, or set it to a Python with mypy, numpy, onnxruntime, pytest and tqdm";
        panic!("GEMMNET_PYTHON names no Python to test the package with; {fix}");
    };
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let site = tempfile::tempdir().unwrap();
    copy(&here.join("gemmnet"), &site.path().join("gemmnet"));
    fs::copy(library(), site.path().join("gemmnet/_native.abi3.so")).unwrap();
    let (tests, settings) = (here.join("tests"), here.join("pyproject.toml"));
    let [tests, settings] = [&tests, &settings].map(|path| path.to_str().expect("a path in Unicode"));
    let pytest = ["-m", "pytest", "--quiet", "-p", "no:cacheprovider", "--config-file", settings, tests];
    let stubtest = ["-m", "mypy.stubtest", "--mypy-config-file", settings, "gemmnet"];
    for arguments in [&pytest[..], &stubtest] {
        let mut command = Command::new(&python);
        // The folder that it runs in comes first where modules are looked for.
        command.args(arguments).current_dir(site.path()).env("PYTHONPATH", site.path());
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        let output = command.output().unwrap_or_else(|e| panic!("{}: {e}", Path::new(&python).display()));
        let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        assert!(output.status.success(), "{arguments:?}: {}\n{out}\n{err}", output.status);
    }
}
