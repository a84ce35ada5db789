// Follows a run whose events go to another tab: asks the host for its records, twice a second.

const EVERY_MS = 500;

export class Follower {
  prompt = null; // that is followed
  #timer = null;

  /** Asks again and again, until it is stopped or another prompt is to be followed.
   *
   * The first question waits as well: a tab hears that a prompt runs before it hears that it is its
   * own.
   *
   * @param ask gives a promise of the prompt's records by node.
   * @param show gets each node and its record.
   */
  start(prompt, ask, show) {
    if (prompt === this.prompt) return;
    this.stop();
    this.prompt = prompt;
    const again = async () => {
      const records = await ask().catch(() => ({})); // a host that is away may come back
      if (prompt !== this.prompt) return;
      for (const [node, record] of Object.entries(records)) show(node, record);
      this.#timer = setTimeout(again, EVERY_MS);
    };
    this.#timer = setTimeout(again, EVERY_MS);
  }

  stop() {
    this.prompt = null;
    clearTimeout(this.#timer);
  }
}
