//! Where blocks begin, and the chunks of tokens that they consist of.

use nsa_core::{NsaConfig, Packing, index};

/// The first row of each block of each sequence.
pub(super) fn starts(config: &NsaConfig, packing: &Packing) -> impl Iterator<Item = impl Iterator<Item = i32>> {
    packing.seqs().map(move |seq| {
        let blocks = 0..index::num_blocks(config, seq.rows.len());
        // Rows of a packing fit.
        blocks.map(move |i| (seq.rows.start + i * config.compress_stride()) as i32)
    })
}

/// The chunks of d tokens that blocks consist of, all sequences in one list.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunks {
    /// The first token of each, `[C]`.
    pub(super) tokens: Vec<i32>,
    /// The block that begins with it, −1 where none does; up to the last block, `[rows]`.
    pub(super) blocks: Vec<i32>,
}

impl Chunks {
    pub(super) fn new(config: &NsaConfig, packing: &Packing) -> Self {
        let stride = config.compress_stride();
        let mut chunks = Self { tokens: Vec::new(), blocks: Vec::new() };
        let mut count = 0;
        for starts in starts(config, packing) {
            let before = chunks.tokens.len();
            chunks.tokens.extend(starts);
            let Some(&last) = chunks.tokens[before..].last() else { continue };
            let first = count;
            count += (chunks.tokens.len() - before) as i32;
            chunks.blocks.resize(before, -1);
            chunks.blocks.extend(first..count);
            chunks.tokens.extend((stride..config.compress_block()).step_by(stride).map(|offset| last + offset as i32));
        }
        chunks
    }

    /// Whether each begins where the one before ends.
    pub(super) fn have_no_gaps(&self, stride: usize) -> bool {
        self.tokens.windows(2).all(|pair| pair[1] - pair[0] == stride as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::Chunks;
    use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};

    fn chunks(lengths: &[usize]) -> Chunks {
        let config = NsaConfig::builder(1, 1, 8, 8).compress_kind(CompressKind::Linear);
        let config = config.compress_block(12).compress_stride(4).select_block(12).build().unwrap();
        Chunks::new(&config, &Packing::new(CuSeqlens::from_lengths(lengths.iter().copied()).unwrap()))
    }

    #[test]
    fn chunks_of_a_sequence_but_its_last_begin_its_blocks() {
        let found = chunks(&[11, 17, 0, 12, 3]);
        assert_eq!(found.tokens, [11, 15, 19, 23, 28, 32, 36]);
        assert_eq!(found.blocks, [0, 1, -1, -1, 2]);
        assert!(!found.have_no_gaps(4));
        assert_eq!(chunks(&[11, 3]), Chunks { tokens: vec![], blocks: vec![] });
    }

    #[test]
    fn whole_chunks_have_no_gaps() {
        assert!(chunks(&[16, 12, 14]).have_no_gaps(4));
        assert!(!chunks(&[13, 12]).have_no_gaps(4));
    }
}
