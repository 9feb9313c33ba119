//! Level 2. The libraries that multiply: OpenBLAS, or without it `matrixmultiply`.

#[cfg(feature = "blas")]
pub(super) use openblas::{choose_kernels, dgemm, setup, sgemm};
#[cfg(not(feature = "blas"))]
pub(super) use pure::{choose_kernels, dgemm, setup, sgemm};

#[cfg(feature = "blas")]
mod openblas {
    use std::cell::Cell;
    use std::ffi::{CStr, c_char, c_int, c_void};
    use std::sync::OnceLock;

    use crate::blas::BackendInfo;
    use crate::blas::gemm::Product;
    use crate::simd::Isa;
    // Names the crate, so that the linker is told about the library.
    use openblas_src as _;

    // SAFETY: these are OpenBLAS' own functions, with the signatures of its cblas.h, in every build of it since 0.3.0.
    unsafe extern "C" {
        fn openblas_set_num_threads(threads: c_int);
        fn openblas_get_num_threads() -> c_int;
        fn openblas_get_config() -> *const c_char;
        fn openblas_get_corename() -> *const c_char;
        fn openblas_get_parallel() -> c_int;
    }

    fn text(pointer: *const c_char) -> String {
        if pointer.is_null() {
            return "unknown".into();
        }
        // SAFETY: OpenBLAS returns a pointer to a constant, NUL-terminated string of its own.
        unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
    }

    fn corename() -> String {
        // SAFETY: no arguments; returns a constant string.
        text(unsafe { openblas_get_corename() })
    }

    /// Kernels without AVX: what OpenBLAS falls back to for a processor that it does not know.
    const BASELINE: [&str; 11] = [
        "Prescott",
        "Core2",
        "Penryn",
        "Dunnington",
        "Nehalem",
        "Atom",
        "Athlon",
        "Opteron",
        "Opteron_SSE3",
        "Barcelona",
        "Bobcat",
    ];

    /// Kernels with AVX-512.
    const AVX512: [&str; 3] = ["SkylakeX", "Cooperlake", "SapphireRapids"];

    fn is_one_of(names: &[&str], core: &str) -> bool {
        names.iter().any(|name| name.eq_ignore_ascii_case(core))
    }

    /// The kernels for these instructions, if they are better than `chosen`.
    fn better_than(chosen: &str, isa: Isa) -> Option<&'static str> {
        let best = [None, Some("Haswell"), Some("SkylakeX")][isa as usize];
        best.filter(|_| is_one_of(&BASELINE, chosen))
    }

    /// The best kernels within these instructions, if `chosen` go beyond.
    fn within(chosen: &str, isa: Isa) -> Option<&'static str> {
        let best = if isa == Isa::Baseline { "Nehalem" } else { "Haswell" };
        let too_much = is_one_of(&AVX512, chosen) || isa == Isa::Baseline && !is_one_of(&BASELINE, chosen);
        Some(best).filter(|_| isa < Isa::Avx512 && too_much)
    }

    /// The variable that names the kernels OpenBLAS shall use.
    const CORETYPE: &str = "OPENBLAS_CORETYPE";

    /// A function without arguments or result in the very library that this crate is linked to. The process may hold
    /// others: a NumPy beside us brings an OpenBLAS of its own.
    fn own_function(name: &CStr) -> Option<unsafe extern "C" fn()> {
        let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
        let address = openblas_get_corename as unsafe extern "C" fn() -> *const c_char;
        // SAFETY: dladdr only looks the address of a function up and fills `info` in.
        if unsafe { libc::dladdr(address as *const c_void, info.as_mut_ptr()) } == 0 {
            return None;
        }
        // SAFETY: dladdr says that it has filled it in; the name lives as long as the library is loaded, which it stays.
        let file = unsafe { info.assume_init().dli_fname };
        // SAFETY: RTLD_NOLOAD loads nothing. A program that OpenBLAS is linked into statically cannot be opened by name,
        // its own symbols are found through a null name.
        let symbol = unsafe {
            let mut library = libc::dlopen(file, libc::RTLD_LAZY | libc::RTLD_NOLOAD);
            if library.is_null() {
                library = libc::dlopen(std::ptr::null(), libc::RTLD_LAZY);
            }
            if library.is_null() { library } else { libc::dlsym(library, name.as_ptr()) }
        };
        // SAFETY: the callers ask for functions of this signature.
        (!symbol.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn()>(symbol) })
    }

    pub(in crate::blas) unsafe fn choose_kernels() {
        // Whoever asks for instructions that there are not gets an error later.
        let Ok(limit) = Isa::limit() else { return };
        let (chosen, isa) = (corename(), Isa::of_processor().min(limit));
        let other = within(&chosen, limit).filter(|_| cfg!(target_arch = "x86_64")).or(better_than(&chosen, isa));
        let Some(core) = other.filter(|_| std::env::var_os(CORETYPE).is_none()) else { return };
        // `void f(void)` in OpenBLAS' driver/others/dynamic.c, where they exist at all.
        let (quit, init) = (own_function(c"gotoblas_dynamic_quit"), own_function(c"gotoblas_dynamic_init"));
        let (Some(quit), Some(init)) = (quit, init) else { return };
        // SAFETY: no other thread is inside OpenBLAS or reads the environment, as the caller promises.
        unsafe {
            std::env::set_var(CORETYPE, core);
            quit();
            init();
            std::env::remove_var(CORETYPE);
        }
    }

    pub(in crate::blas) fn setup() -> &'static BackendInfo {
        static INFO: OnceLock<BackendInfo> = OnceLock::new();
        INFO.get_or_init(|| {
            let core = corename();
            tracing::debug!(core, "OpenBLAS");
            let note = better_than(&core, Isa::used()).map(|better| match std::env::var_os(CORETYPE) {
                Some(_) => format!("{CORETYPE} asks for the slow {core} kernels; unset it to let gemmnet choose"),
                None => format!(
                    "OpenBLAS does not know this processor and uses its slow {core} kernels; call \
                     gemmnet::blas::choose_kernels first thing in the program, or start it with {CORETYPE}={better}"
                ),
            });
            // SAFETY: plain calls with an integer, or none, as argument.
            let (config, threads, parallel) = unsafe {
                openblas_set_num_threads(1);
                (text(openblas_get_config()), openblas_get_num_threads(), openblas_get_parallel())
            };
            let build = match parallel {
                0 => "single-threaded build",
                1 => "pthreads build",
                _ => "OpenMP build",
            };
            let avx512 = is_one_of(&AVX512, &core);
            BackendInfo {
                name: "OpenBLAS",
                config: format!("{config} ({build})"),
                threads: threads.max(1) as usize,
                note,
                rows_alike: avx512,
                multiplies_in_place: avx512,
                core,
            }
        })
    }

    /// One thread inside products that this thread asks for: a build for OpenMP keeps that number for each thread.
    fn one_thread() {
        thread_local! {
            static DONE: Cell<bool> = const { Cell::new(false) };
        }
        if !DONE.replace(true) {
            setup();
            // SAFETY: a plain call with an integer as argument.
            unsafe { openblas_set_num_threads(1) };
        }
    }

    macro_rules! product {
        ($name:ident, $t:ty, $cblas:path) => {
            pub(in crate::blas) fn $name(call: Product<'_, $t>) {
                one_thread();
                let Product { alpha, a, b, beta, c } = call;
                let size = |n: usize| i32::try_from(n).expect("a matrix side fits the 32 bits of BLAS");
                let order = |transposed| {
                    if transposed {
                        cblas_sys::CBLAS_TRANSPOSE::CblasTrans
                    } else {
                        cblas_sys::CBLAS_TRANSPOSE::CblasNoTrans
                    }
                };
                // SAFETY: `Mat::new` checked and `MatMut` promises that rows, columns and leading dimension stay inside
                // the memory, `gemm` that the shapes fit together; C is borrowed exclusively, so it overlaps neither A nor B.
                unsafe {
                    $cblas(
                        cblas_sys::CBLAS_LAYOUT::CblasRowMajor,
                        order(a.transposed),
                        order(b.transposed),
                        size(c.rows),
                        size(c.cols),
                        size(a.cols),
                        alpha,
                        a.data.as_ptr(),
                        size(a.ld),
                        b.data.as_ptr(),
                        size(b.ld),
                        beta,
                        c.pointer,
                        size(c.ld),
                    );
                }
            }
        };
    }
    product!(sgemm, f32, cblas_sys::cblas_sgemm);
    product!(dgemm, f64, cblas_sys::cblas_dgemm);
}

#[cfg(not(feature = "blas"))]
mod pure {
    use crate::blas::BackendInfo;
    use crate::blas::gemm::Product;

    pub(in crate::blas) unsafe fn choose_kernels() {}

    pub(in crate::blas) fn setup() -> &'static BackendInfo {
        static INFO: std::sync::OnceLock<BackendInfo> = std::sync::OnceLock::new();
        INFO.get_or_init(|| BackendInfo {
            name: "matrixmultiply",
            config: "pure Rust product, built without BLAS".into(),
            core: "chosen at run time".into(),
            threads: 1,
            note: Some("build with the feature openblas-system for a faster product".into()),
            rows_alike: false,
            multiplies_in_place: false,
        })
    }

    macro_rules! product {
        ($name:ident, $t:ty, $product:path) => {
            pub(in crate::blas) fn $name(call: Product<'_, $t>) {
                let Product { alpha, a, b, beta, c } = call;
                let strides = |transposed, ld: usize| if transposed { (1, ld as isize) } else { (ld as isize, 1) };
                let ((ra, ca), (rb, cb)) = (strides(a.transposed, a.ld), strides(b.transposed, b.ld));
                // SAFETY: `Mat::new` checked and `MatMut` promises that rows, columns and leading dimension stay inside
                // the memory, `gemm` that the shapes fit together; C is borrowed exclusively, so it overlaps neither A nor B.
                unsafe {
                    $product(
                        c.rows,
                        a.cols,
                        c.cols,
                        alpha,
                        a.data.as_ptr(),
                        ra,
                        ca,
                        b.data.as_ptr(),
                        rb,
                        cb,
                        beta,
                        c.pointer,
                        c.ld as isize,
                        1,
                    );
                }
            }
        };
    }
    product!(sgemm, f32, matrixmultiply::sgemm);
    product!(dgemm, f64, matrixmultiply::dgemm);
}
