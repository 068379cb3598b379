//! Where a function lies in an ELF file, read with as few pages as its tables need.

use std::fs::File;

use object::{Object, ObjectSegment, ObjectSymbol, ReadCache};

/// The offset in `file`, bytes, of the function `symbol`; else why not. Reads, never maps.
pub fn file_offset(file: &File, symbol: &str) -> Result<u64, String> {
    let cache = ReadCache::new(file);
    let elf = object::File::parse(&cache).map_err(|e| format!("not an ELF file: {e}"))?;
    let named = |s: &object::Symbol<'_, '_, _>| s.is_definition() && s.name() == Ok(symbol);
    // The dynamic table is the smaller one.
    let found = elf.dynamic_symbols().find(named).or_else(|| elf.symbols().find(named));
    let address = found.ok_or("no such symbol")?.address();
    for segment in elf.segments() {
        let (offset, size) = segment.file_range();
        if let Some(within) = address.checked_sub(segment.address()).filter(|w| *w < size) {
            return Ok(offset + within);
        }
    }
    Err("the symbol lies outside the file".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[unsafe(no_mangle)]
    extern "C" fn tdfs_symbol_under_test() -> u32 {
        0x7d5
    }

    #[test]
    fn the_offset_leads_to_the_code() {
        use std::os::unix::fs::FileExt;
        let exe = File::open("/proc/self/exe").unwrap();
        let offset = file_offset(&exe, "tdfs_symbol_under_test").unwrap();
        let mut in_file = [0; 4];
        exe.read_exact_at(&mut in_file, offset).unwrap();
        let function = tdfs_symbol_under_test as extern "C" fn() -> u32;
        // SAFETY: code is readable, and a function is longer than this.
        let in_memory = unsafe { std::ptr::read_unaligned(function as *const [u8; 4]) };
        assert_eq!(in_file, in_memory);
    }

    #[test]
    fn unknown_symbols_and_other_files_are_errors() {
        let exe = File::open("/proc/self/exe").unwrap();
        assert_eq!(file_offset(&exe, "no_such_function"), Err("no such symbol".into()));
        let text = File::open(file!().trim_start_matches("tdfs-agent/")).unwrap();
        assert!(file_offset(&text, "main").unwrap_err().contains("not an ELF file"));
    }
}
