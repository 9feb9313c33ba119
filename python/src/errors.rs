//! Errors as Python knows them: the classes are in `gemmnet/errors.py`.

use std::any::Any;
use std::io::ErrorKind;

use gemmnet::Error;
use pyo3::PyErr;

mod classes {
    use pyo3::import_exception;

    import_exception!(gemmnet.errors, Error);
    import_exception!(gemmnet.errors, ShapeError);
    import_exception!(gemmnet.errors, InvalidError);
    import_exception!(gemmnet.errors, DataError);
    import_exception!(gemmnet.errors, FileError);
    import_exception!(gemmnet.errors, MissingFileError);
    import_exception!(gemmnet.errors, DivergedError);
    import_exception!(gemmnet.errors, PanicError);
}

/// The exception that says what `error` says.
pub(crate) fn raised(error: Error) -> PyErr {
    let text = error.to_string();
    match &error {
        Error::Shape { .. } => classes::ShapeError::new_err(text),
        Error::Invalid { .. } => classes::InvalidError::new_err(text),
        Error::Notation { .. } => {
            let place = error.notation_pointer().unwrap_or_default();
            classes::InvalidError::new_err(format!("{text}\n{place}"))
        }
        Error::Data { .. } => classes::DataError::new_err(text),
        Error::Io { source, path, .. } => {
            // The arguments of OSError.
            let arguments = (source.raw_os_error(), text, path.clone());
            match source.kind() {
                ErrorKind::NotFound => classes::MissingFileError::new_err(arguments),
                _ => classes::FileError::new_err(arguments),
            }
        }
        Error::Diverged { .. } => classes::DivergedError::new_err(text),
        _ => classes::Error::new_err(text),
    }
}

/// The exception of a panic: a bug, or memory that ran out.
pub(crate) fn gave_up(panic: &(dyn Any + Send)) -> PyErr {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    classes::PanicError::new_err(format!("gemmnet gave up: {}", text.unwrap_or("it panicked")))
}
