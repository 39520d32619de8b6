//! qcow2fs: parse, log, run, exit code.

fn main() {
    std::process::exit(qcow2fs::cli::run());
}
