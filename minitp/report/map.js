// ---- the choice of colors and their legend ----
function drawModes() {
  $('modes').hidden = modes.length < 2;
  $('modes').replaceChildren(...modes.map(mode => {
    const checked = mode === state.mode, onchange = () => show({ mode });
    return h('label', {}, h('input', { type: 'radio', name: 'mode', value: mode.id, checked, onchange }), h('span', {}, mode.label));
  }));
}
function scaleTicks() {  // [place from 0 to 1, text]: a share of the bound is linear, a total error logarithmic
  if (state.mode.id === 'share') return [[0, '0'], [CALM, CALM], [WARM, WARM], [1, comparing ? 'tolerance' : 'bound']];
  const [low, high] = totals, every = Math.ceil((high - low) / 5);
  return range(Math.floor((high - low) / every) + 1).map(i => [i * every / (high - low), `1e${low + i * every}`]);
}
function drawLegend() {
  root.dataset.mode = state.mode.id;
  const share = state.mode.id === 'share';
  const swatch = (look, text) => h('span', { class: 'swatch' }, h('i', { class: `cell ${look}` }), text);
  $('legend').replaceChildren(...[
    h('div', { class: 'scale' }, h('i', {}, share ? h('b', { class: 'warm' }) : ''), h('div', {}, scaleTicks().map(([at, text]) => h('span', { style: `left:${100 * at}%` }, text)))),
    swatch(share ? 'bad' : 'marked', 'out of bounds'),
    share && cells.some(cell => cell.bounded?.bound === 0) ? swatch('exact', 'exact, as required') : null,
    swatch('none', share || comparing ? 'not recorded' : 'none'),
    guilty ? swatch('blamed', `first ${fault} step`) : null].filter(Boolean));
}

// ---- small maps to choose a pass and a rank ----
function drawThumbs() {
  $('select').hidden = views.length * data.passes.length < 2;
  if ($('select').hidden) return;
  const several = views.length > 1;
  const head = several ? [h('span'), ...views.map(view => h('span', {}, view.label))] : [];
  const lines = data.passes.flatMap((name, pass) =>
    [h('span', { class: 'pass' }, h('bdi', {}, name || 'all')), ...views.map((view, v) => makeThumb(pass, v))]);
  const style = `grid-template-columns: max-content repeat(${views.length}, minmax(26px, 74px))`;
  $('select').replaceChildren(h('h3', {}, several ? 'Pass and rank' : 'Pass'), h('div', { class: 'thumbs', style }, head, lines));
}
function makeThumb(pass, view) {
  const wrongs = arranged.get(modes[0].id)[pass][view].filter(i => i >= 0 && !cells[i].ok).length;
  const rank = views[view].rank === 'worst' ? 'worst over ranks' : rankName(views[view].rank);
  const canvas = h('canvas', { width: columns * 3, height: rows * 3 });
  paintThumb(canvas, pass, view);
  return h('button', { type: 'button', 'aria-label': `${data.passes[pass]} ${rank}: ${wrongs} out of bounds`,
    'data-pass': pass, 'data-view': view, 'aria-pressed': pass === state.pass && view === state.view ? 'true' : 'false',
    onclick: () => show({ pass, view }) }, canvas, h('span', { class: wrongs ? 'wrong' : '' }, wrongs ? `✕ ${wrongs}` : '✓'));
}
let ramp = null;  // the colors of the ramp as the canvas needs them; null when the theme or the mode has changed
function readRamp() {
  const probe = h('i', { class: 'cell', hidden: '' });
  document.body.append(probe);
  const read = (look, t) => {
    probe.className = `cell ${look}`;
    probe.style.setProperty('--t', t);
    return getComputedStyle(probe).backgroundColor;
  };
  const shades = look => range(33).map(i => read(look, i / 32));
  const colors = { '': shades(''), marked: shades('marked'), warm: shades('warm'), bad: read('bad', 0), exact: read('exact', 0) };
  probe.remove();
  return { ...colors, mode: state.mode };
}
function paintThumb(canvas, pass, view) {
  if (ramp?.mode !== state.mode) ramp = readRamp();
  const context = canvas.getContext('2d'), grid = arranged.get(state.mode.id)[pass][view], late = [];
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (let row = 0; row < rows; row++) for (let col = 0; col < (isWide(row) ? 1 : columns); col++) {
    const cell = cells[grid[row * columns + col]], { look, t } = tone(cell, state.mode);
    if (look === 'none') continue;
    if (look === 'bad' || look === 'marked') late.push([row, col]);
    context.fillStyle = look === 'exact' ? ramp.exact : ramp[look === 'bad' ? '' : look][Math.round(t * 32)];
    context.fillRect(col * 3, row * 3, isWide(row) ? canvas.width : 3, 3);
  }
  const [x, y] = [canvas.width / 24, canvas.height / 16];  // wrong steps are drawn larger, or they would be too small to see
  context.fillStyle = ramp.bad;
  for (const [row, col] of late) context.fillRect(col * 3 - x, row * 3 - y, (isWide(row) ? canvas.width : 3) + 2 * x, 3 + 2 * y);
}

// ---- the map ----
const places = [], rowHeads = [], columnHeads = [];  // the map's cells, places[row][column], and its headings
function makeHead() {  // the names of the steps, and above them their blocks: attn, mlp
  const groups = [];
  for (const step of data.steps) {
    const name = step.includes('.') ? step.slice(0, step.indexOf('.')) : '';
    if (groups.at(-1)?.name === name) groups.at(-1).size++; else groups.push({ name, size: 1 });
  }
  const short = step => groups.length > 1 ? step.slice(step.indexOf('.') + 1) : step;
  columnHeads.push(...data.steps.map(step => h('th', { scope: 'col', 'data-step': step }, h('span', {}, short(step)))));
  const above = groups.map(({ name, size }) => h('th', { class: 'group', colspan: size, scope: 'colgroup' }, name));
  return h('thead', {}, groups.length > 1 ? h('tr', {}, h('td'), above) : null,
    h('tr', {}, h('th', { scope: 'col' }, h('span', {}, 'layer')), columnHeads));
}
function makeRow(row) {
  const wide = isWide(row), layer = row - first, colspan = wide ? columns : null;
  const rare = data.layers > 40 && layer % 5 ? 'dense' : null;  // in thin rows only every fifth layer has its number
  rowHeads.push(h('th', wide ? {} : { scope: 'row', 'aria-label': `layer ${layer}`, class: rare }, wide ? '' : layer));
  places.push(range(wide ? 1 : columns).map(col => h('td', { tabindex: -1, 'data-row': row, 'data-col': col, colspan })));
  return h('tr', {}, data.layers ? rowHeads[row] : null, places[row]);
}
function buildMap() {
  const widths = data.layers ? ['layers', ...data.steps.map(() => 'steps')].map(name => h('col', { class: name })) : [];
  const attributes = { role: 'grid', 'aria-label': 'Errors, layers by steps', class: data.layers ? null : 'list' };
  const table = h('table', attributes, h('colgroup', {}, widths), data.layers ? makeHead() : null, h('tbody', {}, range(rows).map(makeRow)));
  table.style.setProperty('--row', data.layers > 48 ? '13px' : '19px');
  table.style.setProperty('--gap', data.layers > 48 ? '1px' : '2px');
  const pick = event => {
    const td = event.target.closest('td[data-row]');
    return td && { row: +td.dataset.row, col: +td.dataset.col };
  };
  table.addEventListener('click', event => { if (pick(event)) show(pick(event), true); });
  table.addEventListener('keydown', moveByKey);
  table.addEventListener('pointermove', event => {
    const mouse = event.pointerType !== 'touch', at = mouse ? pick(event) : null, step = event.target.closest('th')?.dataset.step;
    if (at) tip(event, describe(at)); else if (mouse && step) tip(event, [step, ...explanation(step)].join('\n')); else tip();
  });
  table.addEventListener('pointerleave', () => tip());
  $('map').replaceChildren(table);
}
function paintMap() {
  const [deep, deepest] = state.mode.id === 'total' ? INKS : [1, 1];
  for (let row = 0; row < rows; row++) for (let col = 0; col < places[row].length; col++) {
    const td = places[row][col], cell = cellAt({ ...state, row, col }), { look, t, size } = tone(cell, state.mode);
    const onRamp = look === '' || look === 'marked';
    td.className = `cell ${look}`;
    td.classList.toggle('wide', isWide(row));
    td.classList.toggle('deep', onRamp && t > deep);
    td.classList.toggle('deepest', onRamp && t > deepest);
    td.classList.toggle('blamed', guilty !== null && cell === guilty);
    td.style.setProperty('--t', t.toFixed(3));
    const said = !cell ? 'not recorded' : cell.ok ? brief(size) : `out of bounds, ${brief(size)}`;
    td.setAttribute('aria-label', `${nameOf(row, col)}: ${said}`);
    if (isWide(row)) td.replaceChildren(h('span', { class: 'name' }, h('bdi', {}, nameOf(row, col))),
      data.layers ? '' : h('i', {}, h('b', { class: `cell ${look}` })), h('span', { class: 'number' }, brief(size)));
  }
  for (const button of document.querySelectorAll('.thumbs button'))
    button.setAttribute('aria-pressed', +button.dataset.pass === state.pass && +button.dataset.view === state.view);
}
const placeAt = at => places[at.row][Math.min(at.col, places[at.row].length - 1)];
function markSelection(before, focus) {
  const old = placeAt(before), now = placeAt(state);
  old.tabIndex = -1; old.removeAttribute('aria-selected');
  now.tabIndex = 0; now.setAttribute('aria-selected', 'true');
  for (const [at, on] of [[before, false], [state, true]]) {
    rowHeads[at.row].classList.toggle('here', on);
    if (!isWide(at.row)) columnHeads[at.col].classList.toggle('here', on);
  }
  if (focus) { now.focus({ preventScroll: true }); now.scrollIntoView({ block: 'nearest', inline: 'nearest' }); }
}
function moveByKey(event) {
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const row = clamp(state.row + move[0], 0, rows - 1);  // a wide row keeps the column
  show({ row, col: isWide(state.row) ? state.col : clamp(state.col + move[1], 0, columns - 1) }, true);
}
function describe(place) {
  const at = { ...state, ...place }, cell = cellAt(at);
  const said = explanation(stepOf(at.row, at.col));
  if (!cell) return [fullName(at), 'not recorded', ...said].join('\n');
  const error = cell.bounded, lines = [`${fullName(at)}  ${rankName(cell.rank)}`];
  const bound = error && error.bound !== null ? `, bound ${brief(error.bound)}` : '';
  if (error) lines.push(`${comparing ? 'difference' : 'local error'} ${brief(error.relative)}${bound}`);
  if (cell.total && cell.total !== error) lines.push(`total error ${brief(cell.total.relative)}`);
  return lines.concat(cell.ok ? [] : ['✕ out of bounds'], said).join('\n');
}
function tip(event, text) {
  const box = $('tip');
  box.hidden = !event;
  if (!event) return;
  box.textContent = text;
  const x = clamp(event.clientX + 14, 4, innerWidth - box.offsetWidth - 4);
  const y = event.clientY + 18 + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 10 : event.clientY + 18;
  box.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
}
