//! Answers that are remembered for a while, and a bounded number of them.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Remembers the newest answers. When there are too many the older half goes at once.
pub struct Cache<K, V> {
    young: HashMap<K, (V, Instant)>,
    old: HashMap<K, (V, Instant)>,
    half: usize,
    life: Duration,
}

impl<K: Eq + Hash, V: Clone> Cache<K, V> {
    /// At most `most` answers, each for `life`.
    pub fn new(most: usize, life: Duration) -> Cache<K, V> {
        Cache { young: HashMap::new(), old: HashMap::new(), half: (most / 2).max(1), life }
    }

    /// The answer, if it is not too old.
    pub fn get(&self, key: &K, now: Instant) -> Option<V> {
        let (value, end) = self.young.get(key).or_else(|| self.old.get(key))?;
        (now < *end).then(|| value.clone())
    }

    /// Remembers an answer.
    pub fn put(&mut self, key: K, value: V, now: Instant) {
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, (value, now + self.life));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_grow_old() {
        let (begin, life) = (Instant::now(), Duration::from_secs(10));
        let mut cache = Cache::new(8, life);
        cache.put("a", 1, begin);
        assert_eq!(cache.get(&"a", begin + life / 2), Some(1));
        assert_eq!(cache.get(&"a", begin + life), None);
        cache.put("a", 2, begin + life);
        assert_eq!(cache.get(&"a", begin + life), Some(2), "the newer answer counts");
    }

    #[test]
    fn there_are_never_too_many() {
        let now = Instant::now();
        let mut cache = Cache::new(100, Duration::from_secs(10));
        for key in 0..10_000 {
            cache.put(key, key, now);
            assert!(cache.young.len() + cache.old.len() <= 100);
            assert_eq!(cache.get(&key, now), Some(key));
            let before = key - 49.min(key);
            assert_eq!(cache.get(&before, now), Some(before), "the newest are there");
        }
        assert_eq!(cache.get(&0, now), None);
    }
}
