//! Level 0. Errors as values: which op or file, what was expected, what came, and what to do.

use std::path::PathBuf;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in one line that names the thing and the fix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An array does not have the shape that the operation needs.
    #[error("{op}: {what} has shape {got:?}, expected {expected}")]
    Shape {
        /// The operation, as the caller knows it (`conv2d`, `affine`, ...).
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// The shape that would fit, with the names of its axes.
        expected: String,
        /// The shape that came.
        got: Vec<usize>,
    },
    /// An argument or option has a value that makes no sense.
    #[error("{what}: {problem}; {fix}")]
    Invalid {
        /// The argument, option or operation.
        what: &'static str,
        /// What is wrong with the value, with the value in it.
        problem: String,
        /// What to do.
        fix: String,
    },
    /// The notation of a network cannot be read. `Display` is one line; [`Error::notation_pointer`] draws the place.
    #[error("network notation, character {}: {problem}; {fix} (in `{notation}`)", .position + 1)]
    Notation {
        /// The whole notation.
        notation: String,
        /// Index of the character at fault, from 0.
        position: usize,
        /// What is wrong there.
        problem: String,
        /// What to do.
        fix: String,
    },
    /// A data file or folder is not what it should be.
    #[error("{}: {problem}; {fix}", .path.display())]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        fix: String,
    },
    /// The operating system refused to read or write a file.
    #[error("cannot {action} {}: {source}; {fix}", .path.display())]
    Io {
        /// `read`, `write`, `create`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
        /// What to do.
        fix: String,
    },
    /// Something fetched over the network did not arrive.
    #[error("cannot download {url}: {problem}; {fix}")]
    Download {
        /// The address.
        url: String,
        /// What happened.
        problem: String,
        /// What to do.
        fix: String,
    },
    /// Training produced a loss that is not a number.
    #[error(
        "the loss became {loss} at iteration {iteration}, and {origin}; lower the learning rate (it was {learning_rate:e}) or the weight scale"
    )]
    Diverged {
        /// Iteration at which it happened, from 1.
        iteration: usize,
        /// The loss: infinite or NaN.
        loss: f64,
        /// The learning rate of that iteration.
        learning_rate: f64,
        /// Where the first value that is not finite is, as a part of a sentence: in which parameter or in what which layer
        /// gives.
        origin: String,
    },
}

impl Error {
    /// An [`Error::Invalid`].
    pub fn invalid(what: &'static str, problem: impl Into<String>, fix: impl Into<String>) -> Self {
        Error::Invalid { what, problem: one_line(problem), fix: one_line(fix) }
    }

    /// An [`Error::Data`].
    pub fn data(path: impl Into<PathBuf>, problem: impl Into<String>, fix: impl Into<String>) -> Self {
        Error::Data { path: path.into(), problem: one_line(problem), fix: one_line(fix) }
    }

    /// An [`Error::Io`].
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error, fix: impl Into<String>) -> Self {
        Error::Io { action, path: path.into(), source: of_the_system(source), fix: fix.into() }
    }

    /// For [`Error::Notation`]: the notation and, on a second line, a caret under the character at fault.
    pub fn notation_pointer(&self) -> Option<String> {
        match self {
            Error::Notation { notation, position, .. } => Some(format!("{notation}\n{}^", " ".repeat(*position))),
            _ => None,
        }
    }

    /// Whether the caller asked for something impossible (exit code 2 of the program), as opposed to a failure (1).
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Shape { .. } | Error::Invalid { .. } | Error::Notation { .. })
    }
}

/// The text without control characters: messages quote files and arguments, and what is in them is to break no line and to
/// command no terminal.
pub(crate) fn one_line(text: impl Into<String>) -> String {
    let text = text.into();
    if text.contains(char::is_control) { text.replace(char::is_control, " ") } else { text }
}

/// Checks a shape; `expected` is only formatted on failure.
pub(crate) fn check_shape(op: &'static str, what: &'static str, got: &[usize], expected: &[usize]) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { op, what, expected: format!("{expected:?}"), got: got.to_vec() })
}

/// The system's error alone. The crate tempfile adds the name of a file that nobody has named and that is gone by then.
fn of_the_system(error: std::io::Error) -> std::io::Error {
    match error.to_string().split_once(" at path \"") {
        Some((said, _)) => std::io::Error::new(error.kind(), said),
        None => error,
    }
}
