//! C programs, compiled and linked as their users do it, through pkg-config against an installed library: what they compute
//! is what Rust computes, to the bit, every mistake is a code with a text, and memory is used as it should be.
//!
//! Not under the test harness, which has several threads: the kernels of OpenBLAS are chosen first thing, as in C.

use std::ffi::OsStr;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use gemmnet::data::Image;
use gemmnet::data::cifar10::{DIM, PIXELS};
use gemmnet::data::pictures::write_pictures;
use gemmnet::parallel::with_threads;
use gemmnet::prelude::*;
use gemmnet::train::Model;

const NOTATION: &str = "conv40-bn-relu-pool-res[conv40-bn-relu-conv40-bn]-relu-pool-affine70-relu-affine10";
const IMAGES: usize = 17;

/// Runs a program to its end, which must be a good one.
fn run(program: impl AsRef<OsStr>, arguments: &[&OsStr], variables: &[(&str, &OsStr)]) -> String {
    let output = Command::new(&program).args(arguments).envs(variables.iter().copied()).output();
    let output = output.unwrap_or_else(|e| panic!("{}: {e}", program.as_ref().display()));
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success(), "{} {arguments:?}: {}\n{out}\n{err}", program.as_ref().display(), output.status);
    out
}

struct Room {
    folder: tempfile::TempDir,
}

impl Room {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Compiles a program against the installed library, strictly.
    fn compile(&self, source: &str, libraries: &[&OsStr]) -> PathBuf {
        let pkg_config = self.path("lib/pkgconfig");
        let mut options = vec!["--cflags", "gemmnet"];
        if libraries.is_empty() {
            options.push("--libs");
        }
        let options: Vec<&OsStr> = options.into_iter().map(OsStr::new).collect();
        let found = run("pkg-config", &options, &[("PKG_CONFIG_PATH", pkg_config.as_os_str())]);
        let program = self.path(Path::new(source).file_stem().unwrap().to_str().unwrap());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
        let mut arguments: Vec<&OsStr> =
            ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-g", "-O1"].map(OsStr::new).to_vec();
        arguments.extend([source.as_os_str(), OsStr::new("-o"), program.as_os_str()]);
        arguments.extend(found.split_whitespace().map(OsStr::new));
        arguments.extend(libraries);
        arguments.push(OsStr::new("-pthread"));
        run("cc", &arguments, &[]);
        program
    }

    /// Runs a program with the installed library.
    fn run(&self, program: &Path, arguments: &[&OsStr], variables: &[(&str, &OsStr)]) -> String {
        let library = self.path("lib");
        let mut all = vec![("LD_LIBRARY_PATH", library.as_os_str()), ("DYLD_LIBRARY_PATH", library.as_os_str())];
        all.extend(variables);
        run(program, arguments, &all)
    }
}

/// A checkpoint of a short training on drawn pictures, in `room`.
fn train(room: &Room) -> gemmnet::Result<()> {
    let pictures = room.path("pictures");
    write_pictures(&pictures, 0, 50)?;
    let data = Dataset::open(&pictures, Normalization::PerChannel)?.limit(Split::Train, 40)?;
    let network = Network::<f32>::new(&NetworkSpec::parse(NOTATION)?, DIM, Init::He, 0)?;
    let options = SolverOptions { epochs: 1.0, batch_size: 20, verbose: false, ..SolverOptions::default() };
    let mut solver = Solver::new(network, data, options)?;
    solver.train(|_| ControlFlow::Continue(()))?;
    solver.checkpoint().save(&room.path("model.safetensors"))?;
    solver.into_network().save(&room.path("network.safetensors"))?;
    Network::<f64>::new(&"affine10".parse()?, DIM, Init::He, 0)?.save(&room.path("double.safetensors"))
}

/// Scores of the first test pictures by Rust, and the pictures as the network takes them.
fn scores(room: &Room) -> gemmnet::Result<[Vec<u8>; 2]> {
    let model = Model::<f32>::load(&room.path("model.safetensors"))?;
    let session = Session::new(&model.network, 5)?;
    let records = fs::read(room.path("pictures/test_batch.bin")).unwrap();
    let normalizer = model.normalizer.expect("a checkpoint has one");
    let mut x = vec![0.0; IMAGES * PIXELS];
    for (x, record) in x.chunks_exact_mut(PIXELS).zip(records.chunks_exact(1 + PIXELS)) {
        normalizer.apply(Image::Bytes(&record[1..]), x)?;
    }
    let mut scores = vec![0.0; IMAGES * 10];
    with_threads(2, || {
        let mut scratch = session.scratch();
        let batches = x.chunks(5 * PIXELS).zip(scores.chunks_mut(5 * 10));
        batches.into_iter().try_for_each(|(x, scores)| session.run(x, scores, &mut scratch))
    })??;
    let bytes = |values: Vec<f32>| values.into_iter().flat_map(f32::to_ne_bytes).collect();
    Ok([bytes(x), bytes(scores)])
}

fn main() {
    // `cargo test -- --list` and the like ask what tests there are.
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    // SAFETY: the program has one thread.
    unsafe { gemmnet::blas::choose_kernels() };
    let room = Room { folder: tempfile::tempdir().unwrap() };
    train(&room).unwrap();
    let [x, want] = scores(&room).unwrap();
    fs::write(room.path("images.f32"), x).unwrap();
    fs::write(room.path("damaged.safetensors"), b"no network").unwrap();
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/install-c");
    run(install, &["--profile".as_ref(), "dev".as_ref(), room.folder.path().as_os_str()], &[]);

    let check = room.compile("tests/check.c", &[]);
    let files = ["model.safetensors", "network.safetensors", "double.safetensors", "damaged.safetensors"];
    let files = [&files[..], &["images.f32", "scores.f32"]].concat();
    let files: Vec<PathBuf> = files.into_iter().map(|name| room.path(name)).collect();
    let files: Vec<&OsStr> = files.iter().map(|path| path.as_os_str()).collect();
    room.run(&check, &files, &[]);
    assert!(
        fs::read(room.path("scores.f32")).unwrap() == want,
        "scores of four C threads are those of Rust, to the bit"
    );

    let server = room.compile("examples/server.c", &[]);
    let records = room.path("pictures/test_batch.bin");
    let arguments = [files[0], records.as_os_str(), OsStr::new("4")];
    let shared = room.run(&server, &arguments, &[]);
    assert!(shared.contains("pictures classified by 4 threads"), "{shared}");
    let library = room.path("lib/libgemmnet.a");
    let private = fs::read_to_string(room.path("lib/pkgconfig/gemmnet.pc")).unwrap();
    let private = private.lines().find_map(|line| line.strip_prefix("Libs.private: ")).unwrap();
    let libraries = [library.as_os_str()].into_iter().chain(private.split(' ').map(OsStr::new));
    let server = room.compile("examples/server.c", &libraries.collect::<Vec<_>>());
    assert_eq!(room.run(&server, &arguments, &[]), shared, "linked with the archive");

    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("C programs are right; valgrind is not installed, so their use of memory was not checked");
        return;
    }
    // It knows no AVX-512.
    let avx2 = [("GEMMNET_MAX_ISA", OsStr::new("avx2")), ("OPENBLAS_CORETYPE", OsStr::new("Haswell"))];
    let strict = ["--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"];
    let mut arguments: Vec<&OsStr> = strict.map(OsStr::new).to_vec();
    arguments.push(check.as_os_str());
    arguments.extend(&files);
    room.run(Path::new("valgrind"), &arguments, &avx2);
    println!("C programs are right, and valgrind finds nothing");
}
