// Puts the parts together: what is open stands in the address, the keys work everywhere but in fields.

async function start() {
  const records = await Records.open();
  document.title = records.title;
  $('title').textContent = records.title;
  const list = new List(records, (opened) => { location.hash = `#${opened + 1}`; });
  const siblings = new Siblings(records, (opened) => { location.hash = `#${opened + 1}`; });
  const rollout = new Rollout(records, () => { location.hash = `#${rollout.row.number + 1}/siblings`; });

  let shown = null;
  let going = Promise.resolve();

  /** One at a time: a rollout that takes longer to unpack must not come to stand in the place of a later one. */
  function go() {
    going = going.catch(() => {}).then(() => location.hash === shown || open(shown = location.hash));
    return going;
  }

  async function open(address) {
    const match = /^#(\d+)(\/siblings)?$/.exec(address);
    const opened = match ? Number(match[1]) - 1 : 0;
    if (!records.rows[opened]) {
      $('rollout').replaceChildren(make('p', 'dim', 'No such rollout.'));
      return;
    }
    list.mark(opened);
    await rollout.show(opened);
    if (match?.[2]) await siblings.show(records.rows[opened].group);
    document.body.dataset.ready = address || '#';
  }

  const keys = {
    j: () => list.move(1), k: () => list.move(-1), ArrowDown: () => list.move(1), ArrowUp: () => list.move(-1),
    '/': () => $('search').focus(), s: () => { location.hash = `#${rollout.row.number + 1}/siblings`; }, h: () => rollout.shade(),
    n: () => rollout.moveBlock(1), p: () => rollout.moveBlock(-1), t: theme, '?': () => $('keys').showModal(), Escape: () => list.scroller.focus(),
  };
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $('keys').open) return;
    if (event.target.closest('input, select')) {
      if (event.key === 'Escape') list.scroller.focus();
      return;
    }
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  $('theme').addEventListener('click', theme);
  $('help').addEventListener('click', () => $('keys').showModal());
  window.addEventListener('hashchange', go);
  await go();
}

function theme() {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  document.documentElement.dataset.theme = dark ? 'light' : 'dark';
}

start();
