//! Loads the eBPF object below a pin folder, to see whether this kernel takes it: `load_check PIN_ROOT`.
use aegis_node_agent::ebpf::{Dataplane, MapSizes};
fn main() {
    let root = std::env::args().nth(1).unwrap_or_default();
    match Dataplane::load(root.as_ref(), &MapSizes::default()) {
        Ok(_) => println!("loaded"),
        Err(error) => {
            let mut text = format!("{error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text = format!("{text}\n  {cause}");
                source = cause.source();
            }
            println!("{}", text);
        }
    }
}
