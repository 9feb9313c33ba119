//! The program; everything is in [`gemmnet::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    gemmnet::cli::main()
}
