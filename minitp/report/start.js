// ---- light and dark ----
const prefersDark = matchMedia('(prefers-color-scheme: dark)');
const isDark = () => (root.style.colorScheme || (prefersDark.matches ? 'dark' : 'light')) === 'dark';
function setTheme(theme) {  // '' is the system's
  root.style.colorScheme = theme;
  ramp = null;
  $('theme').textContent = isDark() ? '☼ Light' : '☾ Dark';
  if (places.length) drawThumbs();
}
function followTheme() {
  $('theme').addEventListener('click', () => setTheme(isDark() ? 'light' : 'dark'));
  prefersDark.addEventListener('change', () => setTheme(root.style.colorScheme));
  let kept = '';
  addEventListener('beforeprint', () => { kept = root.style.colorScheme; setTheme('light'); });
  addEventListener('afterprint', () => setTheme(kept));
}

function startMap() {
  const begin = guilty ?? closest;
  Object.assign(state, placeOf(begin), { view: guilty ? viewOf(begin) : 0 });
  drawModes(); buildMap(); drawLegend(); drawThumbs(); paintMap(); markSelection(state, false); drawDetail(); drawGrowth();
  const thumbs = document.querySelector('.thumbs'), pressed = document.querySelector('.thumbs [aria-pressed=true]');
  if (pressed) thumbs.scrollTop = pressed.offsetTop - thumbs.offsetTop - 100;
  const now = placeAt(state), box = $('map');  // on a phone the map scrolls in its own box: bring the step into view
  if (now.offsetLeft + 60 > box.clientWidth) box.scrollLeft = now.offsetLeft - box.clientWidth / 2;
  if (now.offsetTop + 60 > box.clientHeight) box.scrollTop = now.offsetTop - box.clientHeight / 2;
}
function start() {
  $('head').hidden = $('main').hidden = false;
  drawHead(); followTheme(); setTheme('');
  if (cells.length) startMap();
  else $('errors-section').hidden = $('growth-section').hidden = true;  // the plan was wrong, and nothing ran
  drawPlan(); drawTensors();
  let width = innerWidth;
  addEventListener('resize', () => { if (innerWidth !== width) { width = innerWidth; if (cells.length) drawGrowth(); drawPlan(); } });
  root.dataset.ready = Math.round(performance.now());
}
start();
