// Rates that the page computes itself, from the differences between snapshots.

/** Snapshots that are kept: two minutes. */
export const HISTORY = 120;

/** Rates of the last two minutes, from the differences between snapshots. */
export class History {
  constructor() {
    this.rates = [];
    this.last = null;
  }

  add(state) {
    const { tokens_generated: tokens, uptime_seconds: uptime } = state;
    if (this.last && uptime > this.last.uptime && tokens >= this.last.tokens) {
      this.rates.push((tokens - this.last.tokens) / (uptime - this.last.uptime));
      if (this.rates.length > HISTORY) this.rates.shift();
    } else if (this.last) {
      this.rates = []; // another coordinator
    }
    this.last = { tokens, uptime };
  }

  /** Tokens a second over the last few snapshots. */
  get rate() {
    const recent = this.rates.slice(-3);
    return recent.length ? recent.reduce((sum, one) => sum + one, 0) / recent.length : 0;
  }
}
