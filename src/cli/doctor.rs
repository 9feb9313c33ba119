//! Level 7. `gemmnet doctor`: what this machine offers, and what is wrong.

use std::env::consts::ARCH;

use clap::Args;
use serde_json::json;

use super::data::check;
use super::output::{Align, Output, Table};
use super::{Global, Stop};
use crate::blas::{self, Accum, Mat, MatMut, gemm};
use crate::data::places::{default_data_dir, find_cifar10};
use crate::element::Element;
use crate::parallel::current_threads;
use crate::simd::Isa;

/// What gemmnet runs on: BLAS library, processor, threads, data
///
/// Fails if something is broken: a product that is wrong, or data that is damaged. Data that is not there is no failure.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  gemmnet doctor\n  gemmnet doctor --json")]
pub(super) struct DoctorArgs {}

pub(super) fn run(_: &DoctorArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    let blas = blas::setup();
    let mut problems = Vec::new();
    for (dtype, right) in [(f32::NAME, product_is_right::<f32>()), (f64::NAME, product_is_right::<f64>())] {
        if !right {
            problems.push(format!("{} multiplies {dtype} matrices wrongly; install another BLAS library", blas.name));
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (data_dir, data) = match find_cifar10(global.data_dir.as_deref()) {
        Ok(dir) => {
            let checked = check(&dir, out)?;
            let state = match checked.problems.len() {
                0 => checked.state,
                n => format!("{n} problem(s)"),
            };
            problems.extend(checked.problems.iter().map(ToString::to_string));
            let dir = checked.dir.display().to_string();
            (Some(dir.clone()), format!("{dir} ({state})"))
        }
        Err(_) => {
            let fix = format!("not found; `gemmnet data fetch` puts it into {}", default_data_dir().display());
            (None, fix)
        }
    };

    let features = processor_features();
    let mut table = Table::new([("gemmnet", Align::Left), (env!("CARGO_PKG_VERSION"), Align::Left)]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("BLAS", format!("{}, {}", blas.name, blas.config));
    row("kernels", format!("{}, {} thread inside a product", blas.core, blas.threads));
    if let Some(note) = &blas.note {
        row("", note.clone());
    }
    row("processor", format!("{cores} cores, {ARCH} {}; vectors: {}", features.join(" "), Isa::used()));
    row("threads", current_threads().to_string());
    row("data", data);
    out.line(table)?;
    for problem in &problems {
        out.line(format_args!("broken: {problem}"))?;
    }
    out.json(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "blas": blas.name,
        "blas_config": blas.config,
        "blas_core": blas.core,
        "blas_threads": blas.threads,
        "blas_note": blas.note,
        "arch": ARCH,
        "cpu_features": features,
        "isa": Isa::used().to_string(),
        "cores": cores,
        "threads": current_threads(),
        "data_dir": data_dir,
        "problems": problems,
    }))?;
    match problems.len() {
        0 => Ok(()),
        n => Err(Stop::Check(format!("{n} thing(s) are broken; mend what is listed above"))),
    }
}

/// Whether the product gives the right whole numbers, which both types hold exactly.
fn product_is_right<T: Element>() -> bool {
    const N: usize = 96;
    let a: Vec<T> = (0..N * N).map(|i| T::of((i % 7) as f64 - 3.0)).collect();
    let b: Vec<T> = (0..N * N).map(|i| T::of((i % 5) as f64 - 2.0)).collect();
    let mut c = vec![T::nan(); N * N];
    gemm(Accum::Replace, T::one(), Mat::new(&a, N, N, N), Mat::new(&b, N, N, N), MatMut::new(&mut c, N, N, N));
    (0..N * N).all(|i| c[i] == (0..N).map(|k| a[i / N * N + k] * b[k * N + i % N]).sum())
}

/// The instructions that matter to the kernels.
fn processor_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let known = [
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let known: [(&'static str, bool); 0] = [];
    known.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}
