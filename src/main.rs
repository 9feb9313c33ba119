//! The program; everything is in [`gemmnet::cli`].

#![warn(clippy::too_many_lines)]

use std::process::ExitCode;

fn main() -> ExitCode {
    gemmnet::cli::main()
}
