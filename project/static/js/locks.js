// What the tabs of one browser agree on through Web Locks. They exist in secure contexts only.

/** Take a Web Lock: false when it cannot be had, else a function that gives it back. `lost`: another tab stole it. */
export function hold(name, options, lost) {
  return new Promise((resolve) => {
    let held = false;
    const work = (lock) => {
      held = Boolean(lock);
      return held ? new Promise((free) => resolve(free)) : resolve(false);
    };
    navigator.locks.request(name, options, work).catch(() => (held ? lost?.() : resolve(false)));
  });
}

// Over HTTP/1.1 a browser gives a host six connections, whatever the number of its tabs. Four are for streams. A tab that somebody turns to
// takes one from another, which then stands by.
const SEATS = 4;
let seat = null;

/** @returns {Promise<boolean>} whether this tab may have a stream. `lost`: another one took it. */
export async function sit(urgent, lost) {
  if (!navigator.locks || performance.getEntriesByType("navigation")[0]?.nextHopProtocol !== "http/1.1") return true;
  const gone = () => {
    seat = null;
    lost();
  };
  for (let tried = 0; !seat && tried < SEATS + urgent; tried += 1) {
    const free = tried < SEATS;
    const number = free ? tried : Math.floor(Math.random() * SEATS);
    seat = await hold(`switchboard-seat-${number}`, free ? { ifAvailable: true } : { steal: true }, gone);
  }
  return Boolean(seat);
}

/**
 * The seat for the output of a task: one for all tabs, beside those of the pages' own streams, which is the fifth of six connections.
 *
 * @returns {Promise<false | (() => void)>} false: another tab has it; else a function that gives it back. `urgent`: somebody just turned to this tab.
 */
export async function outputSeat(urgent, lost) {
  if (!navigator.locks || performance.getEntriesByType("navigation")[0]?.nextHopProtocol !== "http/1.1") return () => {};
  return hold("switchboard-output", urgent ? { steal: true } : { ifAvailable: true }, lost);
}

export function rise() {
  if (seat) seat();
  seat = null;
}
