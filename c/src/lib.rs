//! gemmnet's inference as a C library: models, sessions, and the memory of those who call them, behind pointers.
//!
//! What each function does stands in `gemmnet.h`, which cbindgen makes of this file. Here everything is checked that C
//! does not: null pointers, lengths, text. No panic crosses the border: it becomes [`Code::GemmnetPanic`].

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError};
use std::{ptr, slice};

use gemmnet::Error;
use gemmnet::data::Image;
use gemmnet::nn::session::SessionScratch;
use gemmnet::parallel::Threads;

/// The version of this interface: it grows when programs that were compiled for an earlier one would no longer work.
pub const GEMMNET_ABI_VERSION: u32 = 1;

/// What became of a call.
#[allow(clippy::enum_variant_names, reason = "C has one space of names")]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Done.
    GemmnetOk = 0,
    /// An argument makes no sense, such as NULL or a batch of 0.
    GemmnetInvalid = 1,
    /// A buffer does not have the length that the network needs.
    GemmnetShape = 2,
    /// A file cannot be read.
    GemmnetIo = 3,
    /// A file or buffer does not hold a network, or a damaged one.
    GemmnetFormat = 4,
    /// No memory left, or a bug in gemmnet: the text says which. What the call was given can still be freed.
    GemmnetPanic = 5,
}

/// What a file holds: a network with its parameters, and if it is a checkpoint, what turns pixels into its input and the names
/// of its classes.
pub struct Model {
    model: gemmnet::train::Model<f32>,
    class_names: Vec<CString>,
}

/// A model ready to run on batches up to a size: immutable, so any number of threads may use it at once.
pub struct Session {
    session: gemmnet::nn::session::Session<f32>,
    /// No other has it.
    number: u64,
}

static SESSIONS: AtomicU64 = AtomicU64::new(0);

/// The memory and the threads of one caller of a session.
pub struct Scratch {
    /// The number of the session that it is for.
    session: u64,
    threads: Threads,
    /// Locked for the time of a call, so that two at once are an error and not a race.
    memory: Mutex<SessionScratch<f32>>,
}

/// An error on its way out.
struct Fault {
    code: Code,
    text: String,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Shape { .. } => Code::GemmnetShape,
            Error::Io { .. } => Code::GemmnetIo,
            Error::Data { .. } => Code::GemmnetFormat,
            _ => Code::GemmnetInvalid,
        };
        Fault { code, text: error.to_string() }
    }
}

fn invalid(text: impl Into<String>) -> Fault {
    Fault { code: Code::GemmnetInvalid, text: text.into() }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function: its error, or its panic, becomes a code and the text of [`gemmnet_last_error`].
fn guarded(body: impl FnOnce() -> Result<(), Fault>) -> Code {
    let fault = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Code::GemmnetOk,
        Ok(Err(fault)) => fault,
        Err(panic) => Fault { code: Code::GemmnetPanic, text: format!("gemmnet gave up: {}", message(&*panic)) },
    };
    let text = CString::new(fault.text.replace('\0', "\\0")).unwrap_or_default();
    LAST_ERROR.with(|last| *last.borrow_mut() = text);
    fault.code
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked")
}

/// # Safety
/// `pointer` is NULL or points to a value that lives, and that nobody changes, as long as the result is used.
unsafe fn reference<'a, T>(pointer: *const T, name: &str) -> Result<&'a T, Fault> {
    // SAFETY: as the caller promises.
    unsafe { pointer.as_ref() }.ok_or_else(|| invalid(format!("{name} is NULL; give one that gemmnet made")))
}

/// `len` elements from `pointer` on.
///
/// # Safety
/// `pointer` is NULL or points to so many elements, which nobody changes as long as the result is used.
unsafe fn elements<'a, T>(pointer: *const T, len: usize, name: &str) -> Result<&'a [T], Fault> {
    check(pointer, len, name)?;
    // SAFETY: neither NULL nor misaligned nor too long; the rest is the caller's promise.
    Ok(if len == 0 { &[] } else { unsafe { slice::from_raw_parts(pointer, len) } })
}

/// [`elements`] to write to.
///
/// # Safety
/// `pointer` is NULL or points to so many elements, which nobody else uses as long as the result is used.
unsafe fn elements_mut<'a, T>(pointer: *mut T, len: usize, name: &str) -> Result<&'a mut [T], Fault> {
    check(pointer, len, name)?;
    // SAFETY: as in `elements`.
    Ok(if len == 0 { &mut [] } else { unsafe { slice::from_raw_parts_mut(pointer, len) } })
}

/// # Errors
/// Where a slice of `len` elements cannot be.
fn check<T>(pointer: *const T, len: usize, name: &str) -> Result<(), Fault> {
    if pointer.is_null() && len > 0 {
        return Err(invalid(format!("{name} is NULL; give a buffer of {len} elements")));
    }
    if !pointer.is_aligned() {
        return Err(invalid(format!("{name} is not aligned; give the address of an array")));
    }
    if len > isize::MAX as usize / size_of::<T>() {
        return Err(invalid(format!("{name} has {len} elements, more than there is memory; give the right length")));
    }
    Ok(())
}

/// An input and an output that have no memory in common.
///
/// # Safety
/// As for [`elements`] and [`elements_mut`].
unsafe fn apart<'a, T, U>(
    (from, from_len, from_name): (*const T, usize, &str),
    (to, to_len, to_name): (*mut U, usize, &str),
) -> Result<(&'a [T], &'a mut [U]), Fault> {
    check(from, from_len, from_name)?;
    check(to, to_len, to_name)?;
    // Lengths in bytes that have been checked; addresses that wrap around are no buffers.
    let end = |address: usize, bytes: usize| address.saturating_add(bytes);
    let (a, b) = (from.addr(), to.addr());
    if a < end(b, to_len * size_of::<U>()) && b < end(a, from_len * size_of::<T>()) {
        return Err(invalid(format!("{from_name} and {to_name} overlap; give two buffers")));
    }
    // SAFETY: as the caller promises, and apart from each other.
    unsafe { Ok((elements(from, from_len, from_name)?, elements_mut(to, to_len, to_name)?)) }
}

/// Gives a new value to the caller.
///
/// # Safety
/// `place` is NULL or may be written to.
unsafe fn give<T>(place: *mut *mut T, name: &str, make: impl FnOnce() -> Result<T, Fault>) -> Result<(), Fault> {
    if place.is_null() {
        return Err(invalid(format!("{name} is NULL; give the address of a pointer")));
    }
    // SAFETY: as the caller promises. NULL first, so that freeing it does no harm whatever happens.
    unsafe { *place = ptr::null_mut() };
    // What would otherwise panic in the first operation.
    gemmnet::check_environment()?;
    let value = Box::new(make()?);
    // SAFETY: as above.
    unsafe { *place = Box::into_raw(value) };
    Ok(())
}

/// Frees what [`give`] gave.
///
/// # Safety
/// `pointer` is NULL or from [`give`], not freed before, and nobody uses it.
unsafe fn free<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // A value whose drop panics is a bug, which must not cross the border either.
        // SAFETY: as the caller promises.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(pointer) })));
    }
}

/// The version of the interface that the library has; a program that wants to be sure compares it with
/// GEMMNET_ABI_VERSION, that of the header that it was compiled with.
#[unsafe(no_mangle)]
pub extern "C" fn gemmnet_abi_version() -> u32 {
    GEMMNET_ABI_VERSION
}

/// The text of the last error on the calling thread, in UTF-8; empty before the first. Valid until the next error on this
/// thread.
#[unsafe(no_mangle)]
pub extern "C" fn gemmnet_last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}

/// Where OpenBLAS is older than the processor, and so runs several times slower than it could, makes it choose better kernels. It
/// changes the environment for a moment, so it is for a program that calls it first thing, while it has one thread.
#[unsafe(no_mangle)]
pub extern "C" fn gemmnet_choose_kernels() -> Code {
    guarded(|| {
        gemmnet::check_environment()?;
        // SAFETY: the program has one thread, as the header demands.
        unsafe { gemmnet::blas::choose_kernels() };
        Ok(())
    })
}

/// Reads the file at `path`, which `gemmnet train` or the library saved, into `*model`.
///
/// # Safety
/// `path` is NULL or ends with a zero; `model` is NULL or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_model_load(path: *const c_char, model: *mut *mut Model) -> Code {
    guarded(|| {
        let read = || {
            if path.is_null() {
                return Err(invalid("path is NULL; give the path of a saved network"));
            }
            // SAFETY: not NULL, and as the caller promises.
            let path = unsafe { CStr::from_ptr(path) };
            Ok(Model::new(gemmnet::train::Model::load(&path_of(path)?)?))
        };
        // SAFETY: as the caller promises.
        unsafe { give(model, "model", read) }
    })
}

#[cfg(unix)]
fn path_of(path: &CStr) -> Result<PathBuf, Fault> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    Ok(OsStr::from_bytes(path.to_bytes()).into())
}

#[cfg(not(unix))]
fn path_of(path: &CStr) -> Result<PathBuf, Fault> {
    path.to_str().map(PathBuf::from).map_err(|_| invalid("path is not UTF-8; give one that is"))
}

/// The same from the `len` bytes of such a file, which are not needed afterwards.
///
/// # Safety
/// `bytes` is NULL or has `len` bytes; `model` is NULL or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_model_load_buffer(bytes: *const u8, len: usize, model: *mut *mut Model) -> Code {
    guarded(|| {
        let read = || {
            // SAFETY: as the caller promises.
            let bytes = unsafe { elements(bytes, len, "bytes") }?;
            Ok(Model::new(gemmnet::train::Model::from_bytes(bytes, Path::new("the buffer"))?))
        };
        // SAFETY: as the caller promises.
        unsafe { give(model, "model", read) }
    })
}

impl Model {
    fn new(model: gemmnet::train::Model<f32>) -> Self {
        let text = |name: &String| CString::new(name.replace('\0', "\\0")).unwrap_or_default();
        Model { class_names: model.class_names.iter().map(text).collect(), model }
    }
}

/// Frees a model; NULL is none.
///
/// # Safety
/// It is not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_model_free(model: *mut Model) {
    // SAFETY: as the caller promises.
    unsafe { free(model) }
}

/// Channels, height and width of the pictures that the network takes, into `shape`.
///
/// # Safety
/// `model` is NULL or one; `shape` is NULL or has 3 elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_model_input_shape(model: *const Model, shape: *mut usize) -> Code {
    guarded(|| {
        // SAFETY: as the caller promises.
        let (model, shape) = unsafe { (reference(model, "model")?, elements_mut(shape, 3, "shape")?) };
        shape.copy_from_slice(&model.model.network.input());
        Ok(())
    })
}

/// The number of classes, which is that of the scores of a picture; 0 for NULL.
///
/// # Safety
/// `model` is NULL or one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_model_classes(model: *const Model) -> usize {
    // SAFETY: as the caller promises.
    unsafe { model.as_ref() }.map_or(0, |model| model.model.network.classes())
}

/// The name of class `index`, in UTF-8, as long as the model is not freed; NULL if it has none.
///
/// # Safety
/// `model` is NULL or one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_model_class_name(model: *const Model, index: usize) -> *const c_char {
    // SAFETY: as the caller promises.
    let model = unsafe { model.as_ref() };
    model.and_then(|model| model.class_names.get(index)).map_or(ptr::null(), |name| name.as_ptr())
}

/// Turns pictures of bytes, channel by channel and row by row, into the network's input, as it was trained: `x` gets `len`
/// values for `len` pixels. Only a checkpoint says how.
///
/// # Safety
/// `model` is NULL or one; `pixels` and `x` are NULL or have `len` elements each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_model_normalize(
    model: *const Model,
    pixels: *const u8,
    x: *mut f32,
    len: usize,
) -> Code {
    guarded(|| {
        // SAFETY: as the caller promises.
        let (model, (pixels, x)) =
            unsafe { (reference(model, "model")?, apart((pixels, len, "pixels"), (x, len, "x"))?) };
        let Some(normalizer) = &model.model.normalizer else {
            let fix = "load a checkpoint, or prepare the input yourself";
            return Err(invalid(format!(
                "the file holds a network alone, without what turns pixels into its input; {fix}"
            )));
        };
        let image: usize = model.model.network.input().iter().product();
        if !len.is_multiple_of(image) {
            let text = format!("{len} pixels are not a whole number of pictures of {image}; give the right length");
            return Err(Fault { code: Code::GemmnetShape, text });
        }
        for (pixels, x) in pixels.chunks_exact(image).zip(x.chunks_exact_mut(image)) {
            normalizer.apply(Image::Bytes(pixels), x)?;
        }
        Ok(())
    })
}

/// Makes a model ready to run on up to `batch` pictures at once. The model may be freed afterwards. Scores of sessions for
/// other batches may differ in rounding.
///
/// # Safety
/// `model` is NULL or one; `session` is NULL or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_session_new(model: *const Model, batch: usize, session: *mut *mut Session) -> Code {
    guarded(|| {
        let make = || {
            // SAFETY: as the caller promises.
            let model = unsafe { reference(model, "model") }?;
            let session = gemmnet::nn::session::Session::new(&model.model.network, batch)?;
            Ok(Session { session, number: SESSIONS.fetch_add(1, Ordering::Relaxed) })
        };
        // SAFETY: as the caller promises.
        unsafe { give(session, "session", make) }
    })
}

/// Frees a session; NULL is none.
///
/// # Safety
/// Neither it nor a scratch of it is used afterwards, but to free that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_session_free(session: *mut Session) {
    // SAFETY: as the caller promises.
    unsafe { free(session) }
}

/// Makes the memory for one caller of a session, and starts `threads` threads for its calls; none for 1, which run on the
/// thread that makes them. 0 is one thread for each core, or as many as GEMMNET_NUM_THREADS says.
///
/// # Safety
/// `session` is NULL or one; `scratch` is NULL or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_scratch_new(
    session: *const Session,
    threads: usize,
    scratch: *mut *mut Scratch,
) -> Code {
    guarded(|| {
        let make = || {
            // SAFETY: as the caller promises.
            let session = unsafe { reference(session, "session") }?;
            let threads = Threads::new(gemmnet::parallel::thread_count(Some(threads).filter(|&threads| threads > 0))?)?;
            let memory = Mutex::new(threads.run(|| session.session.scratch()));
            Ok(Scratch { session: session.number, threads, memory })
        };
        // SAFETY: as the caller promises.
        unsafe { give(scratch, "scratch", make) }
    })
}

/// Frees a scratch; NULL is none.
///
/// # Safety
/// It is not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_scratch_free(scratch: *mut Scratch) {
    // SAFETY: as the caller promises.
    unsafe { free(scratch) }
}

/// Scores of pictures: `x` holds their `x_len` values, picture by picture, channel by channel, row by row, and `scores` gets
/// one row of `scores_len` / classes values for each. The number of pictures is up to the session's batch. Scores of a
/// picture do not depend on the others, but for rounding where OpenBLAS has no AVX-512 kernels.
///
/// # Safety
/// `session` and `scratch` are NULL or such; `x` and `scores` are NULL or have so many elements, which nobody else writes
/// during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmnet_run(
    session: *const Session,
    scratch: *const Scratch,
    x: *const f32,
    x_len: usize,
    scores: *mut f32,
    scores_len: usize,
) -> Code {
    guarded(|| {
        // SAFETY: as the caller promises.
        let (session, scratch) = unsafe { (reference(session, "session")?, reference(scratch, "scratch")?) };
        // SAFETY: as the caller promises.
        let (x, scores) = unsafe { apart((x, x_len, "x"), (scores, scores_len, "scores")) }?;
        if scratch.session != session.number {
            return Err(invalid("the scratch was made for another session; make one for this"));
        }
        let mut memory = match scratch.memory.try_lock() {
            Ok(memory) => memory,
            // What a call that panicked left there is scratch all the same.
            Err(TryLockError::Poisoned(memory)) => memory.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(invalid("another thread uses the scratch; make one for each thread"));
            }
        };
        let memory = &mut *memory;
        Ok(scratch.threads.run(|| session.session.run(x, scores, memory))?)
    })
}
