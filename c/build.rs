//! Gives the library the name by which programs ask for it when they start: the file name with the ABI's version, so that two
//! versions can be installed side by side.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        // GEMMNET_ABI_VERSION in src/lib.rs
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libgemmnet.so.1");
    }
}
